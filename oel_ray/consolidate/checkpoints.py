"""Find and check the checkpoints inside a round, as files, and restore the outputs of a job that resumes.

Runs in the driver and on rank 0. Imports no torch; `attempts` writes the checkpoints. They hold no random state,
because every draw is derived from the run's seed, the round, the step and the prefix.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import orjson
from pydantic import ValidationError

from oel_ray.consolidate.job import Job
from oel_ray.records import Record, content_hash
from oel_ray.runs.files import FileEntry, fingerprint, write_atomically, write_json

STATE_FILE, ATTEMPT_FILE, NOTES_FILE = "state.json", "attempt.json", "notes.txt"
DEEPSPEED, WEIGHTS, OUTPUTS = "deepspeed", "weights", "outputs"
KEPT = 2
"""Checkpoints kept in a round. If the newest is damaged, only the steps after the one before are lost."""

_SPREAD = {"workers", "zero_stage", "precision", "micro_batch_tokens", "teacher_cache_gib", "teacher_offload_gib"}
_SPREAD |= {"gradient_checkpointing", "chunk_tokens", "checkpoint_every", "max_failures", "max_skipped_steps"}
_SPREAD |= {"packing", "offload_optimizer", "resources"}
"""Settings of the section that change how the work is done, not its result."""


class Spread(Record):
    """The settings that shard the optimizer state. A trainer with others cannot load it."""

    workers: int
    zero_stage: int
    precision: Literal["float32", "bfloat16"]
    offload_optimizer: bool

    @classmethod
    def of(cls, job: Job) -> "Spread":
        return cls(**{name: getattr(job.config.consolidate, name) for name in cls.model_fields})

    def __str__(self) -> str:
        host = ", optimizer on the host" if self.offload_optimizer else ""
        return f"{self.workers} ranks, ZeRO stage {self.zero_stage}, {self.precision}{host}"


class State(Record):
    """The description of a checkpoint. Written last, before the folder gets its final name."""

    key: str
    """Key of the job, see `job_key`."""
    step: int
    """Number of finished steps."""
    updates: int
    """Number of applied steps among them."""
    spread: Spread
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    state: State

    def damage(self) -> str:
        """Describe the first file that was changed or is missing; "" if all are as written."""
        for name, recorded in self.state.files.items():
            path = self.folder / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != recorded.bytes or fingerprint(path) != recorded:
                return f"{path} was changed"
        return ""


def job_key(job: Job) -> str:
    """Compute a key that is equal for jobs with the same result, which may resume from each other's checkpoints."""
    config = job.config.model_dump(mode="json", exclude={"engines", "cluster", "collect", "evaluate", "rounds", "env"})
    config["consolidate"] = {key: value for key, value in config["consolidate"].items() if key not in _SPREAD}
    models = [
        [(file.name, file.stat().st_size) for file in sorted(folder.iterdir()) if file.is_file()]
        for folder in (job.policy, job.teacher)
    ]
    prefixes = [(prefix.id, prefix.prompt_ids) for prefix in job.prefixes]
    knowledge = [(text.id, text.text) for text in job.knowledge]
    plan = [[tuple(draw) for draw in draws] for draws in job.plan]
    return content_hash(config, job.round, job.deployed, models, prefixes, knowledge, plan)


def usable(job: Job) -> list[Checkpoint]:
    """List the complete checkpoints of this job, the newest first."""
    key, found = job_key(job), []
    for path in job.scratch.glob(f"*/step-*/{STATE_FILE}"):
        try:
            state = State.from_json(path.read_bytes())
        except (OSError, ValidationError):
            continue
        if state.key == key:
            found.append(Checkpoint(path.parent, state))
    return sorted(found, key=lambda checkpoint: -checkpoint.state.step)


def prepare(job: Job) -> tuple[int, str]:
    """Delete everything from the scratch folder that this job cannot resume from, before a driver starts it.

    Returns the number of the next attempt, and a note for the user, or "".
    """
    shutil.rmtree(job.target, ignore_errors=True)
    job.target.mkdir()
    if kept := [checkpoint.folder for checkpoint in usable(job)[:KEPT]]:
        for folder in job.scratch.glob("*/*step-*"):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)
        (job.scratch / NOTES_FILE).unlink(missing_ok=True)
        return _last_attempt(job) + 1, ""
    lost = any(job.scratch.glob(f"*/step-*/{STATE_FILE}"))
    shutil.rmtree(job.scratch, ignore_errors=True)
    job.scratch.mkdir()
    what = "damaged, or of other settings, another policy, other games or knowledge"
    return 0, f"round {job.round}: consolidation starts over: its checkpoints are {what}" if lost else ""


def next_attempt(job: Job) -> int:
    """Return the number of the next attempt at this job, counted from 0, and count it."""
    number = _last_attempt(job) + 1
    write_json(job.scratch / ATTEMPT_FILE, {"attempt": number})
    return number


def keep_outputs(job: Job, step: int, folder: Path) -> None:
    """Copy the metrics and samples of the first steps into a checkpoint's folder."""
    (folder / OUTPUTS).mkdir(parents=True)
    for path in (job.metrics, job.samples):
        rows = [row for row in path.read_bytes().splitlines(keepends=True) if orjson.loads(row)["step"] < step]
        (folder / OUTPUTS / path.name).write_bytes(b"".join(rows))


def bring_back_outputs(job: Job, checkpoint: Checkpoint | None) -> None:
    """Restore metrics and samples from the checkpoint, or empty them without one."""
    for path in (job.metrics, job.samples):
        write_atomically(path, (checkpoint.folder / OUTPUTS / path.name).read_bytes() if checkpoint else b"")


def _last_attempt(job: Job) -> int:
    path = job.scratch / ATTEMPT_FILE
    return int(orjson.loads(path.read_bytes())["attempt"]) if path.exists() else -1
