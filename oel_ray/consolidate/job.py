"""What the driver hands to the training ranks. Imports no torch, so that the driver stays light."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oel_ray.config.schema import RunConfig
from oel_ray.consolidate.prefixes import Plan
from oel_ray.records import Frame, Generate, KnowledgeText, Prefix


@dataclass(frozen=True)
class Job:
    """What a training group is to do. The same on every rank."""

    config: RunConfig
    round: int
    policy: Path
    """The policy that the student starts from, and that the engines serve at first."""
    teacher: Path
    """The frozen model that the student is held against: the same folder, unless another is configured."""
    deployed: str
    """The weight version that the engines serve at the start."""
    prefixes: Sequence[Prefix]
    knowledge: Sequence[KnowledgeText]
    plan: Plan
    generate: Generate
    engines: Callable[[], Sequence[Any]]
    """Handles of all engines that weights go to; raises `EngineUnavailable` if one is dead for good."""
    on_gpu: bool
    metrics: Path
    samples: Path
    target: Path
    """Where the new policy goes."""
    profile: Path
    """Where what torch's profiler records goes."""
    scratch: Path
    """Where Ray Train and the checkpoints of this job lie, also for the next driver if this one dies."""
    frame: Frame | None = None
    """What stands around every prompt of the run, see `ChatFormat`."""
