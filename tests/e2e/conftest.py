"""One small run that nobody disturbs, for all tests that compare with it."""

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.e2e.test_run import SMALL, oel
from tests.support.tiny_models import save_tiny_model, store_head


@pytest.fixture(scope="package", autouse=True)
def _noon() -> Iterator[None]:
    """The day of whoever is started here does not change while the tests run; see `another_day`."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = f"NOON{datetime.now(UTC).hour - 12:+d}"
    yield
    os.environ.pop("TZ")
    os.environ |= {"TZ": before} if before else {}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the folders of real models are: a tied head is stored once more, and the chat template says what day it is."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    store_head(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "<|im_start|>system\nToday is {{ strftime_now('%d %B %Y') }}<|im_end|>\n" + (
        tokenizer.chat_template
    )
    tokenizer.save_pretrained(folder)
    return folder


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
