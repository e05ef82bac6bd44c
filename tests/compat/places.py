"""Where the parts of the package lie that these tests look at: the one file here to change when modules move."""

from oel_ray import envs
from oel_ray.cli.main import app
from oel_ray.config.load import load_config, preset_names, read_source
from oel_ray.config.precision import Auto
from oel_ray.config.schema import RunConfig
from oel_ray.consolidate.checkpoints import Spread, State
from oel_ray.imports.games import read_trajectories
from oel_ray.imports.knowledge import read_knowledge
from oel_ray.play.scores import Evaluation, Score, StepScore
from oel_ray.records import (
    AccumulationStep,
    BadLine,
    EvaluationGame,
    Frame,
    Gate,
    KnowledgeItem,
    KnowledgeText,
    Record,
    SampleRow,
    StepRow,
    Trajectory,
    Turn,
)
from oel_ray.runs.files import FileEntry, read_json, write_json
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.layout import Manifest, StageEntry
from oel_ray.runs.lock import Holder
from oel_ray.text.chat import ChatFormat

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
