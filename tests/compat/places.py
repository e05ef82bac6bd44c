"""Where the parts of the package lie that these tests look at: the one file here to change when modules move."""

from oel_ray import envs
from oel_ray.chat import ChatFormat
from oel_ray.cli import app
from oel_ray.config import RunConfig
from oel_ray.configure import load_config, preset_names, read_source
from oel_ray.consolidate.checkpoints import Spread, State
from oel_ray.durable import FileEntry, read_json, write_json
from oel_ray.evaluate.metrics import Evaluation, Gate, Score, StepScore
from oel_ray.imports import read_knowledge, read_trajectories
from oel_ray.layout import Manifest, StageEntry
from oel_ray.lock import Holder
from oel_ray.precision import Auto
from oel_ray.records import (
    AccumulationStep,
    BadLine,
    EvaluationGame,
    Frame,
    KnowledgeItem,
    KnowledgeText,
    Record,
    Trajectory,
    Turn,
)
from oel_ray.runs import RunFolder
from oel_ray.verify import SampleRow, StepRow

__all__ = [
    "AccumulationStep",
    "Auto",
    "BadLine",
    "ChatFormat",
    "Evaluation",
    "EvaluationGame",
    "FileEntry",
    "Frame",
    "Gate",
    "Holder",
    "KnowledgeItem",
    "KnowledgeText",
    "Manifest",
    "Record",
    "RunConfig",
    "RunFolder",
    "SampleRow",
    "Score",
    "Spread",
    "StageEntry",
    "State",
    "StepRow",
    "StepScore",
    "Trajectory",
    "Turn",
    "app",
    "envs",
    "load_config",
    "preset_names",
    "read_json",
    "read_knowledge",
    "read_source",
    "read_trajectories",
    "write_json",
]
