"""Makes `tests` and this `oel_ray` importable in every process that a test starts, a Ray worker too.

Marks the tests that docs/faults.md names: `pytest -m faults` runs them.
"""

import os
from pathlib import Path

import pytest

from tests.named_tests import named_tests

_ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    named = set(named_tests())
    for item in items:
        file, _, name = item.nodeid.partition("::")
        if (file, name.partition("[")[0]) in named:
            item.add_marker("faults")
