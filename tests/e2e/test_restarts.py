"""A whole run, with vLLM, whose trainer or driver is killed inside a round: it ends as if nothing had been."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_run import SMALL, oel
from tests.support.tiny_models import save_tiny_model

SETTINGS = [*SMALL, "consolidate.steps=4", "consolidate.checkpoint_every=2", "evaluate.in_context=false"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert oel("run", "exact", f"model={model}", *SETTINGS, "--run-dir", str(folder)).returncode == 0
    return folder


def samples(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "rounds/001/consolidation/samples.jsonl").read_bytes().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "weight_version"} for line in lines]


def assert_same(ours: Path, theirs: Path) -> None:
    assert samples(ours) == samples(theirs)
    weights = [(folder / "rounds/001/policy/model.safetensors").read_bytes() for folder in (ours, theirs)]
    assert weights[0] == weights[1]
    verified = oel("verify", str(ours), "--replay")
    assert verified.returncode == 0, verified.stdout
    assert not list(ours.rglob("step-*")), "checkpoints are gone once the stage is committed"


@pytest.mark.slow
def test_a_sender_killed_in_the_middle_of_a_sync_costs_no_byte_of_the_run(
    undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ended = oel(
        "run", "exact", f"model={model}", *SETTINGS, "--run-dir", str(folder), kill_after="r001.s0003.a0:half-sent"
    )
    assert ended.returncode == 0, ended.stderr
    assert "consolidation goes on: attempt 1, after step 2 of 4" in ended.stderr
    assert_same(folder, undisturbed)


@pytest.mark.slow
def test_after_a_driver_is_killed_inside_a_round_it_resumes_at_the_last_checkpoint(
    undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = ["run", "exact", f"model={model}", *SETTINGS, "--run-dir", str(folder)]
    assert oel(*arguments, kill_after="1:consolidate:2-done").returncode == -signal.SIGKILL
    ended = oel("run", "--resume", "--run-dir", str(folder))
    assert ended.returncode == 0, ended.stderr
    assert "consolidation goes on: attempt 1, after step 2 of 4" in ended.stderr
    assert_same(folder, undisturbed)
