"""Checkpoints as files: which one a job goes on from."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from oel_ray.config.load import parse_config
from oel_ray.consolidate import checkpoints
from oel_ray.consolidate.checkpoints import Checkpoint, Spread, State
from oel_ray.consolidate.job import Job
from oel_ray.consolidate.prefixes import Draw
from oel_ray.records import KnowledgeText, Prefix
from oel_ray.runs.files import files_below, fingerprint, write_json


async def nobody(*_: Any, **__: Any) -> Any:
    raise AssertionError


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    text = KnowledgeText(id="k", round=1, seed=0, format="structured", text="left", tokens=0, items=[], steps=[])
    return Job(
        config=parse_config({}).settled("bfloat16"),
        round=1,
        policy=tmp_path / "model",
        teacher=tmp_path / "model",
        deployed="r000",
        prefixes=[Prefix(id="g/0", trajectory_id="g", turn=0, prompt_ids=[1, 2])],
        knowledge=[text],
        plan=[[Draw(0, 0)]] * 4,
        generate=nobody,
        engines=list,
        on_gpu=False,
        metrics=tmp_path / "metrics.jsonl",
        samples=tmp_path / "samples.jsonl",
        target=tmp_path / "policy",
        profile=tmp_path / "profile",
        scratch=tmp_path / "scratch",
    )


def saved(job: Job, step: int, run: str = "a") -> Checkpoint:
    folder = job.scratch / run / f"step-{step:04d}"
    (folder / checkpoints.OUTPUTS).mkdir(parents=True)
    for path in (job.metrics, job.samples):
        (folder / checkpoints.OUTPUTS / path.name).write_text(f"{step}\n")
    files = {file.relative_to(folder).as_posix(): fingerprint(file) for file in files_below(folder)}
    state = State(key=checkpoints.job_key(job), step=step, updates=step, spread=Spread.of(job), files=files)
    write_json(folder / checkpoints.STATE_FILE, state.model_dump())
    return Checkpoint(folder, state)


def changed(job: Job, **consolidate: Any) -> Job:
    return dataclasses.replace(job, config=parse_config({"consolidate": consolidate}).settled("bfloat16"))


def test_only_the_newest_two_checkpoints_of_this_job_are_kept(job: Job) -> None:
    oldest, older, newer = saved(job, 2), saved(job, 8), saved(job, 10, "b")
    (job.scratch / "a" / ".step-0012").mkdir()
    (job.scratch / "a" / "step-0014").mkdir()  # without a state
    saved(changed(job, learning_rate=1e-3), 16)
    assert checkpoints.usable(job) == [newer, older, oldest]
    assert checkpoints.prepare(job) == (0, "")
    assert sorted(path.name for path in job.scratch.glob("*/*step-*")) == ["step-0008", "step-0010"]
    checkpoints.bring_back_outputs(job, newer)
    assert (job.metrics.read_text(), job.samples.read_text()) == ("10\n", "10\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda job: changed(job, learning_rate=1e-3),
        lambda job: dataclasses.replace(job, deployed="r001"),
        lambda job: dataclasses.replace(job, plan=job.plan[1:]),
        lambda job: dataclasses.replace(job, prefixes=[job.prefixes[0].model_copy(update={"prompt_ids": [1, 3]})]),
        lambda job: dataclasses.replace(job, knowledge=[job.knowledge[0].model_copy(update={"text": "right"})]),
    ],
)
def test_a_job_with_other_inputs_or_settings_ignores_and_deletes_the_checkpoints(job: Job, change: Any) -> None:
    saved(job, 2)
    checkpoints.next_attempt(job)
    number, said = checkpoints.prepare(change(job))
    assert number == 0
    assert "starts over" in said
    assert list(job.scratch.iterdir()) == []


def test_a_job_spread_over_other_ranks_or_precision_may_use_the_checkpoint(job: Job) -> None:
    saved(job, 2)
    spread = {"workers": 1, "zero_stage": 3, "precision": "float32"}
    other = changed(job, **spread, micro_batch_tokens=7, packing="always", offload_optimizer=True)
    (found,) = checkpoints.usable(other)
    assert found.state.spread != Spread.of(other)
    assert str(found.state.spread) == "2 ranks, ZeRO stage 2, bfloat16"


def test_a_changed_or_missing_file_of_a_checkpoint_is_found(job: Job) -> None:
    checkpoint = saved(job, 2)
    assert checkpoint.damage() == ""
    path = checkpoint.folder / checkpoints.OUTPUTS / "metrics.jsonl"
    path.write_text("3\n")
    assert checkpoint.damage() == f"{path} was changed"
    path.unlink()
    assert checkpoint.damage() == f"{path} is missing"


def test_attempt_numbers_go_on_after_a_restart(job: Job) -> None:
    job.scratch.mkdir()
    assert [checkpoints.next_attempt(job) for _ in range(3)] == [0, 1, 2]
    saved(job, 2)
    assert checkpoints.prepare(job) == (3, "")


def test_a_checkpoint_keeps_the_rows_of_its_own_steps(job: Job, tmp_path: Path) -> None:
    """The last good weights are kept when steps behind them have been written down."""
    for path in (job.metrics, job.samples):
        path.write_bytes(b"".join(b'{"step": %d}\n' % step for step in (0, 0, 1, 2, 2)))
    checkpoints.keep_outputs(job, 2, tmp_path / "step")
    for path in (job.metrics, job.samples):
        assert (
            tmp_path / "step" / checkpoints.OUTPUTS / path.name
        ).read_bytes() == b'{"step": 0}\n' * 2 + b'{"step": 1}\n'


def test_without_a_checkpoint_old_attempts_are_deleted_and_nothing_is_reported(job: Job) -> None:
    job.scratch.mkdir()
    (job.scratch / "old").mkdir()
    job.target.mkdir()
    (job.target / "half").touch()
    assert checkpoints.prepare(job) == (0, "")
    assert list(job.scratch.iterdir()) == list(job.target.iterdir()) == []
    checkpoints.bring_back_outputs(job, None)
    assert job.metrics.read_bytes() == b""
