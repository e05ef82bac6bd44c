"""One stage of one round by hand: for a closer look, or for games and knowledge from elsewhere. Runs in the driver."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from oel_ray import loop
from oel_ray.config.precision import Auto
from oel_ray.config.schema import RunConfig
from oel_ray.errors import UserError
from oel_ray.imports.games import Imported, put_trajectories, read_trajectories
from oel_ray.imports.knowledge import put_knowledge, read_knowledge
from oel_ray.preflight import config_from_round, preflight
from oel_ray.records import KnowledgeText, TrainingSplit
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.layout import IMPORT_KNOWLEDGE, IMPORT_OF, PREPARE, RUN_FILE
from oel_ray.runs.schedule import PLAYED, check_ready, first_open_round
from oel_ray.telemetry.progress import Progress


@dataclass(frozen=True)
class SingleStage:
    """A stage that can be done. All that comes from elsewhere is read and checked."""

    folder: Path
    config: RunConfig
    is_new: bool
    round: int
    name: str
    trajectories: dict[TrainingSplit, Imported]
    knowledge: list[KnowledgeText]
    auto: Auto

    def open(self) -> RunFolder:
        """Start the run, or go on with it; takes the folder's lock."""
        if self.is_new:
            return RunFolder.create(self.folder, self.config, self.auto)
        return RunFolder.resume(self.folder, None)

    def work(self, folder: RunFolder, progress: Progress) -> None:
        """Put in what comes from elsewhere, and do the stage; raises what `loop.run` raises."""
        loop.prepare(folder.config, folder, progress)
        for split, imported in self.trajectories.items():
            if imported.bad:
                progress.note(f"bad lines left out: {len(imported.bad)}, with the reasons in {folder.quarantine}")
            put_trajectories(folder, self.round, split, imported)
        if self.knowledge:
            put_knowledge(folder, self.round, self.knowledge)
        loop.work(folder.config, folder, progress, [(self.round, self.name)])


def plan_stage(
    path: Path,
    settings: RunConfig | None,
    name: str,
    round_number: int | None,
    trajectories: dict[TrainingSplit, Path],
    knowledge: list[Path],
    max_bad: float,
    note: Callable[[str], None],
) -> SingleStage:
    """Check and read all that a stage needs; writes nothing.

    `settings` start a new run at `path`, or must be those of the run there. Without `round_number` it is the first
    round that lacks the stage. Files stand in for what the run would have made itself; `max_bad` is the share of bad
    lines in a file of trajectories that is left out.

    Raises:
        UserError: something is missing or wrong.
    """
    run = RunFolder.open_to_resume(path, settings) if (path / RUN_FILE).exists() else None
    if run:
        config, committed = run.config, run.committed
    elif settings:
        RunFolder.check_new(path)
        config, committed = settings, {}
    else:
        raise UserError(f"{path} holds no run: start one there with --config CONFIG")
    committed[0] = committed.get(0, set()) | {PREPARE}  # every stage makes up for it
    number = first_open_round(config, committed, name) if round_number is None else round_number
    incoming = [IMPORT_OF[split] for split in trajectories] + ([IMPORT_KNOWLEDGE] if knowledge else [])
    check_ready(config, committed, number, name, incoming)
    model, auto = preflight(config_from_round(run, number) if run else config, note, plays=name in PLAYED)
    games = {
        split: read_trajectories(file, number, split, config, model.chat, max_bad)
        for split, file in trajectories.items()
    }
    texts = read_knowledge(knowledge, number, config, model.chat)
    return SingleStage(path, config, run is None, number, name, games, texts, auto)
