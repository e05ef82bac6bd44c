"""What lies where in a run folder: file names, stages, the manifest of a round. Any process; no Ray, torch or vLLM."""

from pathlib import Path

from oel_ray.records import KnowledgeText, Record, Split, TrainingSplit
from oel_ray.runs.files import FileEntry

SCHEMA_VERSION = 1
CONFIG_FILE, RUN_FILE, STATUS_FILE, METRICS_FILE = "config.yaml", "run.json", "status.json", "metrics.jsonl"
MANIFEST_FILE = "MANIFEST.json"
REPLACED_CONFIG = "config-{}.yaml"
"""A configuration that another one replaced, by how many there were before it; see `StageEntry.config`."""
QUARANTINE = "quarantine"
WORK = ".work-"
"""Begins the name of the folder of a stage that is not committed."""
POLICY_REFERENCE = "policy.json"

PREPARE = "prepare"
COLLECT = "collect"
EXTRACT = "extract"
EVALUATE_IN_CONTEXT = "evaluate_in_context"
CONSOLIDATE = "consolidate"
EVALUATE = "evaluate"

# Stages that nobody plans: what came from elsewhere instead of from `collect` and `extract`.
IMPORT_EXTRACTION = "import_extraction"
IMPORT_CONSOLIDATION = "import_consolidation"
IMPORT_KNOWLEDGE = "import_knowledge"
IMPORT_OF: dict[TrainingSplit, str] = {"extraction": IMPORT_EXTRACTION, "consolidation": IMPORT_CONSOLIDATION}
IMPORTS = (*IMPORT_OF.values(), IMPORT_KNOWLEDGE)

BAD_LINES = "bad_lines"
"""How a stage counts the lines of an imported file that were left out."""


class StageEntry(Record):
    """What a committed stage left behind. `files` has paths relative to the round folder.

    `config` counts how often the run's configuration had changed before.
    """

    completed: str
    wall_s: float
    counts: dict[str, int]
    files: dict[str, FileEntry]
    config: int = 0


class Manifest(Record):
    version: int = SCHEMA_VERSION
    round: int
    stages: dict[str, StageEntry]


class RoundFiles:
    """Where the files of a round lie, below its folder or below the work folder of a stage."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = root / MANIFEST_FILE
        self.in_context = root / "in_context.jsonl"
        self.consolidation_metrics = root / "consolidation" / "metrics.jsonl"
        self.samples = root / "consolidation" / "samples.jsonl"
        self.policy = root / "policy"
        self.evaluation = root / "evaluation.json"
        self.evaluation_games = root / "evaluation.jsonl"

    def trajectories(self, split: Split) -> Path:
        return self.root / "trajectories" / f"{split}.jsonl"

    def knowledge(self, seed: int) -> Path:
        return self.root / "knowledge" / f"seed-{seed:02d}.json"

    def knowledge_files(self) -> list[Path]:
        return sorted((self.root / "knowledge").glob("seed-*.json"))

    def knowledge_texts(self) -> list[KnowledgeText]:
        return [KnowledgeText.from_json(file.read_bytes()) for file in self.knowledge_files()]

    def policy_after(self, steps: int) -> Path:
        """The policy as it was inside the round, after so many optimizer steps."""
        return self.root / "policies" / f"{steps:04d}"
