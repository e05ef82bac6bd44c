"""Define the job that the driver gives to the training ranks. Imports no torch, so that the driver stays light."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oel_ray.config.schema import RunConfig
from oel_ray.consolidate.prefixes import Plan
from oel_ray.records import Frame, Generate, KnowledgeText, Prefix


@dataclass(frozen=True)
class Job:
    """The task of a training group. Equal on every rank."""

    config: RunConfig
    round: int
    policy: Path
    """The policy that the student starts from and that the engines serve at the start."""
    teacher: Path
    """The frozen model that the student learns from; the same folder, unless another is configured."""
    deployed: str
    """The weight version that the engines serve at the start."""
    prefixes: Sequence[Prefix]
    knowledge: Sequence[KnowledgeText]
    plan: Plan
    generate: Generate
    engines: Callable[[], Sequence[Any]]
    """Returns the handles of all engines that receive weights; raises `EngineUnavailable` if one cannot be replaced."""
    on_gpu: bool
    metrics: Path
    samples: Path
    target: Path
    """The folder of the new policy."""
    profile: Path
    """The folder for the records of torch's profiler."""
    scratch: Path
    """The folder of Ray Train's files and the checkpoints of this job, which outlives the driver."""
    frame: Frame | None = None
    """The part of the chat template around every prompt of the run, see `ChatFormat`."""
