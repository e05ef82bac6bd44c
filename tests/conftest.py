"""Makes `tests` and this `oel_ray` importable in every process that a test starts, a Ray worker too.

Marks the tests that docs/faults.md names: `pytest -m faults` runs them. Property tests draw the same examples every
time, so that a change fails by itself and not by chance; `make fuzz` draws new ones.
"""

import os
from pathlib import Path

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
