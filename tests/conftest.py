"""Makes `tests` and this `oel_ray` importable in every process that a test starts, a Ray worker too.

Marks the tests that docs/faults.md names: `pytest -m faults` runs them. Property tests draw the same examples every
time, so that a change fails by itself and not by chance; `make fuzz` draws new ones.

`make check` leaves out the tests that are marked `ray`, `vllm` or `process`. A test that starts a process and has none
of these marks fails.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support.named_tests import named_tests

_ROOT = Path(__file__).parents[1]
settings.register_profile("same", derandomize="OEL_RAY_FUZZ" not in os.environ, deadline=None)
settings.load_profile("same")
os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    named = set(named_tests())
    for item in items:
        file, _, name = item.nodeid.partition("::")
        if (file, name.partition("[")[0]) in named:
            item.add_marker("faults")
        if "e2e" in Path(file).parts:
            item.add_marker("ray")
            item.add_marker("vllm")


_started: list[str] = []


def _note_process(event: str, arguments: tuple[Any, ...]) -> None:
    # Programs of this environment alone: libraries ask `uname` and the like once in the life of a process.
    if event == "subprocess.Popen" and str(Path(sys.executable).parent) in str(arguments[:2]):
        _started.append(str(arguments[1])[:200])


sys.addaudithook(_note_process)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Whoever starts a process says so, or `make check` would grow slow without anybody's notice."""
    yield
    marks, processes = {mark.name for mark in item.iter_markers()}, [*_started]
    _started.clear()
    assert not processes or marks & {"ray", "vllm", "process"}, f"mark this test, for it started {processes}"
