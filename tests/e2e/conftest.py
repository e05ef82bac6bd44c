"""One small run that nobody disturbs, for all tests that compare with it."""

import time
from pathlib import Path

import pytest

from tests.e2e.test_run import SMALL, oel
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def timed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of the run, and the seconds that it took."""
    folder, began = tmp_path_factory.mktemp("runs") / "undisturbed", time.monotonic()
    finished = oel("run", "exact", f"model={model}", *SMALL, "--run-dir", str(folder))
    assert finished.returncode == 0, finished.stderr
    assert "reverse KL" in finished.stdout
    assert "max_restarts" not in finished.stderr, "Ray warns of what it cannot restart"
    return folder, time.monotonic() - began


@pytest.fixture(scope="session")
def undisturbed(timed: tuple[Path, float]) -> Path:
    return timed[0]
