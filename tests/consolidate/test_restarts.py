"""Ranks and drivers are killed in the middle of a round, and the round ends as if nothing had been. See `driver.py`."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from oel_ray.runs.layout import RoundFiles
from tests.support.consolidation_driver import PER_STEP, STEPS
from tests.support.tiny_models import save_tiny_model

pytestmark = pytest.mark.process

AFTER_FOUR = "1:consolidate:3-done"
EACH_STEP = "consolidate.checkpoint_every=1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert drive(model, folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def killed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a driver leaves that was killed after four steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("killed")
    assert drive(model, folder, EACH_STEP, kill=AFTER_FOUR).returncode == -signal.SIGKILL
    assert not (folder / "policy" / "model.safetensors").exists()
    return folder


def drive(
    model: Path, folder: Path, *settings: str, kill: str = "", spoilt: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a driver to its end, which is that of its Ray: of a killed driver, ranks would go on for a while."""
    command = [sys.executable, "-m", "tests.support.consolidation_driver", str(model), str(folder), *settings]
    environment = {**os.environ, "OEL_RAY_KILL_AFTER": kill, "SPOILT_STEPS": spoilt}
    driver = psutil.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    below = set[psutil.Process]()
    while True:
        try:
            output, errors = driver.communicate(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            below.update(driver.children(recursive=True))
    print(output, errors)
    for process in below:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(below, timeout=60)
    return subprocess.CompletedProcess(command, driver.returncode, output, errors)


def kept(folder: Path) -> list[int]:
    """The steps of the checkpoints that lie there."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("scratch/*/step-*"))


def rows(folder: Path, name: str, *without: str) -> list[dict[str, Any]]:
    lines = (folder / f"{name}.jsonl").read_bytes().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in without} for line in lines]


def assert_same(ours: Path, theirs: Path) -> None:
    """Prefixes, knowledge and responses in order, losses, and the weights that they led to."""
    assert rows(ours, "samples", "weight_version") == rows(theirs, "samples", "weight_version")
    assert [row["loss"] for row in rows(ours, "metrics")] == [row["loss"] for row in rows(theirs, "metrics")]
    weights = [(folder / "policy" / "model.safetensors").read_bytes() for folder in (ours, theirs)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_rank_that_is_killed_restarts_from_the_last_checkpoint_and_repeats_its_steps(
    undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    ended = drive(model, tmp_path, kill="1:consolidate:3:rank-1:attempt-0")
    assert ended.returncode == 0
    assert ended.stdout.count("note:") == 1
    assert f"attempt 1, after step 2 of {STEPS}" in ended.stdout
    assert_same(tmp_path, undisturbed)
    metrics = rows(tmp_path, "metrics")
    assert [row["weight_version"][-2:] for row in metrics] == ["a0", "a0", "a1", "a1", "a1", "a1"]
    assert [row["generated_by"] for row in metrics][:4] == ["r000", "r001.s0001.a0", "r001.s0002.a1", "r001.s0003.a1"]


@pytest.mark.slow
def test_a_rank_killed_before_the_first_checkpoint_restarts_from_the_beginning(
    undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    ended = drive(model, tmp_path, kill="1:consolidate:1:rank-0:attempt-0")
    assert ended.returncode == 0
    assert "attempt 1, from the start" in ended.stdout
    assert_same(tmp_path, undisturbed)
    assert [row["generated_by"] for row in rows(tmp_path, "metrics")][:2] == ["r000", "r001.s0001.a1"]


@pytest.mark.slow
def test_after_its_driver_is_killed_a_resumed_round_gives_the_same_bytes(
    undisturbed: Path, killed: Path, model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(killed, tmp_path / "again")
    done = kept(folder)[-1]
    assert done >= 3
    ended = drive(model, folder, EACH_STEP)
    assert ended.returncode == 0
    assert f"attempt 1, after step {done} of {STEPS}" in ended.stdout
    assert_same(folder, undisturbed)
    assert kept(folder) == [4, 5], "the newest two, of both drivers together"


@pytest.mark.slow
def test_another_number_of_ranks_resumes_with_the_weights_and_a_fresh_optimizer(
    killed: Path, model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(killed, tmp_path / "again")
    ended = drive(model, folder, "consolidate.workers=1")
    assert ended.returncode == 0
    told = "the checkpoint was written with 2 ranks, ZeRO stage 2, float32, and this is 1 ranks, ZeRO stage 2, float32"
    assert f"{told}: its weights are taken, and the optimizer starts anew" in ended.stdout
    assert [row["step"] for row in rows(folder, "metrics")] == list(range(STEPS))
    assert rows(folder, "metrics", "weight_version")[:2] == rows(killed, "metrics", "weight_version")[:2]


@pytest.mark.slow
def test_checkpoints_of_another_job_are_deleted(killed: Path, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(killed, tmp_path / "again")
    ended = drive(model, folder, "consolidate.learning_rate=2e-3", kill="1:consolidate:0-done")
    assert "consolidation starts over: its checkpoints are damaged, or of other settings" in ended.stdout
    assert ended.returncode == -signal.SIGKILL
    assert rows(folder, "metrics")[0]["weight_version"] == "r001.s0001.a0"


@pytest.mark.slow
def test_with_its_newest_checkpoint_damaged_a_round_resumes_from_the_one_before(
    undisturbed: Path, killed: Path, model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(killed, tmp_path / "again")
    *_, before, newest = kept(folder)
    damage(folder, newest)
    ended = drive(model, folder)
    assert ended.returncode == 0
    assert f"weights/model.safetensors was changed: the checkpoint of step {newest} is not used" in ended.stdout
    assert f"attempt 1, after step {before} of {STEPS}" in ended.stdout
    assert_same(folder, undisturbed)
    attempts = [row["weight_version"][-2:] for row in rows(folder, "metrics")]
    assert attempts == ["a0"] * before + ["a1"] * (STEPS - before)
    assert kept(folder) == [before, before + 2], "the damaged one is none of the two"


@pytest.mark.slow
def test_without_an_undamaged_checkpoint_a_round_starts_from_the_beginning(
    undisturbed: Path, killed: Path, model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(killed, tmp_path / "again")
    damaged = kept(folder)
    for step in damaged:
        damage(folder, step)
    ended = drive(model, folder)
    assert ended.returncode == 0
    assert [f"the checkpoint of step {step} is not used" in ended.stdout for step in damaged[-2:]] == [True, True]
    assert "attempt 1, from the start" in ended.stdout
    assert_same(folder, undisturbed)
    assert kept(folder) == [2, 4]


def damage(folder: Path, step: int) -> None:
    (path,) = folder.glob(f"scratch/*/step-{step:04d}/weights/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.slow
def test_with_staleness_1_a_restart_generates_its_first_responses_with_the_checkpoint(
    model: Path, tmp_path: Path
) -> None:
    ended = drive(model, tmp_path, "consolidate.max_staleness=1", kill="1:consolidate:3:rank-1:attempt-0")
    assert ended.returncode == 0
    assert [row["generated_by"] for row in rows(tmp_path, "metrics")] == [
        "r000",
        "r000",
        "r001.s0002.a1",
        "r001.s0002.a1",
        "r001.s0003.a1",
        "r001.s0004.a1",
    ]


@pytest.mark.slow
def test_an_error_that_would_repeat_ends_the_run_without_a_restart_and_keeps_good_weights(
    model: Path, tmp_path: Path
) -> None:
    ended = drive(model, tmp_path, "consolidate.learning_rate=1e30", "consolidate.max_skipped_steps=1")
    assert ended.returncode == 1
    assert (
        "failed: consolidation: rank 0: RunFailed: loss or gradient was not finite in 2 steps in a row" in ended.stdout
    )
    assert "attempt 1" not in ended.stdout
    metrics = rows(tmp_path, "metrics")
    applied = [row["applied"] for row in metrics]
    assert applied[-2:] == [False, False]
    good = len(applied) - 2
    assert kept(tmp_path)[-1] == good
    (checkpoint,) = tmp_path.glob(f"scratch/*/step-{good:04d}")
    assert load_file(checkpoint / "weights" / "model.safetensors")
    assert [row["step"] for row in rows(checkpoint / "outputs", "metrics")] == list(range(good))


@pytest.mark.slow
def test_a_step_with_nans_on_one_rank_is_skipped_on_all_ranks_and_reported(model: Path, tmp_path: Path) -> None:
    ended = drive(model, tmp_path, "consolidate.keep_steps=[2,3,4]", spoilt="2")
    assert ended.returncode == 0
    assert "progress: 3 KL not finite\n" in ended.stdout
    metrics = rows(tmp_path, "metrics")
    assert [row["applied"] for row in metrics] == [True, True, False, True, True, True]
    assert [row["loss"] is None for row in metrics] == [row["kl_per_token"] is None for row in metrics]
    assert [row["loss"] is None for row in metrics] == [not row["applied"] for row in metrics]
    lacking = [row["step"] for row in rows(tmp_path, "samples") if row["kl"] is None]
    assert set(lacking) == {2}
    assert len(lacking) < PER_STEP, "the samples of rank 0 have their KL"
    before, skipped, after = (
        (RoundFiles(tmp_path).policy_after(step) / "model.safetensors").read_bytes() for step in (2, 3, 4)
    )
    assert before == skipped != after, "no rank applied it, and all went on"


@pytest.mark.slow
def test_too_many_steps_with_nans_end_the_run_in_one_line_and_it_can_be_resumed(
    undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    ended = drive(model, tmp_path, EACH_STEP, "consolidate.max_skipped_steps=1", spoilt="2,3")
    assert ended.returncode == 1
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("failed:")]
    assert line.endswith("RunFailed: loss or gradient was not finite in 2 steps in a row, up to step 3")
    assert rows(tmp_path, "metrics")[-1]["kl_per_token"] is None
    assert not list((tmp_path / "policy").iterdir())
    assert kept(tmp_path) == [1, 2]
    ended = drive(model, tmp_path)
    assert ended.returncode == 0
    assert f"attempt 1, after step 2 of {STEPS}" in ended.stdout
    assert_same(tmp_path, undisturbed)


ADAPTERS = ["consolidate.lora={rank: 4, alpha: 8}", "consolidate.learning_rate=1e-2"]


@pytest.fixture(scope="module")
def undisturbed_adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    assert drive(model, folder, *ADAPTERS).returncode == 0
    return folder


@pytest.mark.slow
def test_a_killed_rank_with_adapters_restarts_from_the_last_checkpoint_with_the_same_bytes(
    undisturbed_adapters: Path, model: Path, tmp_path: Path
) -> None:
    ended = drive(model, tmp_path, *ADAPTERS, kill="1:consolidate:3:rank-1:attempt-0")
    assert ended.returncode == 0
    assert f"attempt 1, after step 2 of {STEPS}" in ended.stdout
    assert_same(tmp_path, undisturbed_adapters)


@pytest.mark.slow
def test_another_number_of_ranks_resumes_with_the_adapters_and_a_fresh_optimizer(
    undisturbed_adapters: Path, model: Path, tmp_path: Path
) -> None:
    ended = drive(model, tmp_path, *ADAPTERS, kill=AFTER_FOUR)
    assert ended.returncode == -signal.SIGKILL
    done = max(
        int(path.parent.parent.name.removeprefix("step-")) for path in tmp_path.glob("scratch/*/step-*/*/adapters.*")
    )
    ended = drive(model, tmp_path, *ADAPTERS, "consolidate.workers=1")
    assert ended.returncode == 0
    assert "its weights are taken, and the optimizer starts anew" in ended.stdout
    ours, theirs = (rows(folder, "metrics") for folder in (tmp_path, undisturbed_adapters))
    assert [row["step"] for row in ours] == list(range(STEPS))
    assert [row["loss"] for row in ours[:done]] == [row["loss"] for row in theirs[:done]]
    assert ours[done]["kl_per_token"] == pytest.approx(theirs[done]["kl_per_token"], rel=1e-4), "the same function"
