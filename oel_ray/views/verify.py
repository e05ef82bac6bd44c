"""`oel verify`: checks every promise that a run folder makes. Any process; imports no Ray, torch or vLLM.

Only committed stages are looked at: what an interrupted stage left behind promises nothing.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import ValidationError

from oel_ray.errors import UserError
from oel_ray.extract.items import growth
from oel_ray.ids import StepVersion, evaluation_ids, policy_version, prefix_id, training_id
from oel_ray.play.scores import Evaluation, Score, by_step, passed_gate, score
from oel_ray.records import (
    AnyRecord,
    EvaluationGame,
    Gate,
    KnowledgeText,
    SampleRow,
    StepRow,
    TrainingSplit,
    Trajectory,
    first_problem,
    join_items,
)
from oel_ray.runs import layout
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.layout import RoundFiles, StageEntry
from oel_ray.runs.schedule import is_done, planned_stages

Replay = Callable[[Trajectory], tuple[bool, str]]
"""Plays a game's actions again: whether it was won, and what differs from the recorded texts ("" for nothing).

A game that cannot be played again counts as lost, and the text says why.
"""

TOLERANCE = 1e-6


class Finding(NamedTuple):
    """A broken promise. `line` counts from 1; 0 means the file as a whole."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}" if self.line else f"{self.file}: {self.message}"


_Games = list[EvaluationGame]
_Numbered = Sequence[tuple[int, Trajectory]]


def verify(path: Path, replay: Replay | None = None) -> list[Finding]:
    """Everything that is wrong with a run folder; [] for a clean one.

    Raises:
        UserError: no run lies at `path`.
    """
    return _Check(RunFolder.open(path), replay).run()


class _Check:
    def __init__(self, folder: RunFolder, replay: Replay | None) -> None:
        self.folder = folder
        self.replay = replay
        self.findings: list[Finding] = []
        self.seen: dict[str, str] = {}
        """Where each id was met first."""
        self.collected: dict[str, str] = {}
        """The first collected trajectory of each map, or of each seed if the run splits by seed."""
        self.held_out: list[tuple[Path, int, EvaluationGame]] = []

    def found(self, path: Path, line: int, message: str) -> None:
        self.findings.append(Finding(path.relative_to(self.folder.path).as_posix(), line, " ".join(message.split())))

    def run(self) -> list[Finding]:
        try:
            self.config = self.folder.config
        except (OSError, UserError, yaml.YAMLError) as error:
            self.found(self.folder.path / layout.CONFIG_FILE, 0, f"cannot be read: {error}")
            return self.findings
        finished = self._says_finished()
        for number in sorted({*self.folder.rounds(), *(range(self.config.rounds + 1) if finished else ())}):
            self._round(number, finished)
        for path, line, game in self.held_out:
            if where := self.collected.get(self._map(game)):
                self.found(path, line, f"held-out {self._map(game)} was also collected: {where}")
        metrics = self.folder.path / layout.METRICS_FILE
        for line, text in _lines(metrics):
            try:
                json.loads(text)
            except ValueError:
                self.found(metrics, line, "is not JSON")
        return self.findings

    def _says_finished(self) -> bool:
        path = self.folder.path / layout.STATUS_FILE
        try:
            return bool(json.loads(path.read_bytes())["state"] == "finished")
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.found(path, 0, f"cannot be read: {error!r}")
            return False

    def _round(self, number: int, finished: bool) -> None:
        files = self.folder.files(number)
        try:
            stages = self.folder.manifest(number).stages
        except UserError as error:
            self.found(files.manifest, 0, str(error).removeprefix(f"{files.manifest} "))
            return
        last = self.folder.config
        for name in planned_stages(last, number) if finished and number <= last.rounds else []:
            if not is_done(stages, name):
                self.found(files.manifest, 0, f"lacks stage {name}, although the run says finished")
        for path, what in self.folder.changed_files(number):
            self.found(path, 0, what)
        checks: dict[str, Callable[[int, RoundFiles, StageEntry], None]] = {
            layout.COLLECT: self._collect,
            layout.IMPORT_EXTRACTION: partial(self._training_games, split="extraction"),
            layout.IMPORT_CONSOLIDATION: partial(self._training_games, split="consolidation"),
            layout.EXTRACT: self._knowledge,
            layout.IMPORT_KNOWLEDGE: partial(self._knowledge, imported=True),
            layout.CONSOLIDATE: self._consolidate,
        }
        for name, entry in stages.items():
            self.config = self.folder.config_of(entry)
            if number > self.config.rounds or name not in (*planned_stages(self.config, number), *layout.IMPORTS):
                self.found(files.manifest, 0, f"stage {name} was never planned")
            if check := checks.get(name):
                check(number, files, entry)
        in_context = None
        if layout.EVALUATE_IN_CONTEXT in stages:
            self.config = self.folder.config_of(stages[layout.EVALUATE_IN_CONTEXT])
            texts = [text for file in files.knowledge_files() for text in _parsed(file, KnowledgeText)]
            steps = [len(grown[0].steps) for grown in growth(texts, self.config.evaluate.accumulation_steps) if grown]
            in_context = self._games(number, files.in_context, "in_context", stages[layout.EVALUATE_IN_CONTEXT], steps)
        if layout.EVALUATE in stages:
            self.config = self.folder.config_of(stages[layout.EVALUATE])
            games = self._games(number, files.evaluation_games, "policy", stages[layout.EVALUATE])
            self._evaluation(number, files.evaluation, games, in_context)

    def _collect(self, number: int, files: RoundFiles, entry: StageEntry) -> None:
        for split, planned in self.config.training_games.items():
            self._training_games(number, files, entry, split, planned)

    def _records(self, path: Path, kind: type[AnyRecord]) -> list[tuple[int, AnyRecord]]:
        records = []
        for line, text in _lines(path):
            try:
                records.append((line, kind.model_validate_json(text)))
            except ValidationError as error:
                self.found(path, line, f"is not a {kind.__name__}: {first_problem(error)}")
        return records

    def _count(self, path: Path, entry: StageEntry, name: str, there: int) -> None:
        if entry.counts.get(name) != there:
            self.found(path, 0, f"holds {there} {name} records, the manifest says {entry.counts.get(name)}")

    def _planned(self, path: Path, there: int, planned: int, what: str) -> None:
        if there != planned:
            self.found(path, 0, f"holds {there} {what}, planned were {planned}")

    def _as_planned(self, path: Path, games: _Numbered, planned: list[str], version: str, what: str) -> None:
        """Every planned game has one record, and no other has one; the policy of that weight version played."""
        self._planned(path, len(_lines(path)), len(planned), what)
        for identity in sorted({*planned} ^ {game.id for _, game in games}):
            self.found(path, 0, f"{identity} {'is missing' if identity in planned else 'was never planned'}")
        for line, game in games:
            if others := {turn.weight_version for turn in game.turns} - {version}:
                self.found(path, line, f"{game.id} was played by weights {min(others)}, deployed were {version}")

    def _unique(self, path: Path, line: int, identity: str) -> None:
        where = f"{path.relative_to(self.folder.path).as_posix()}:{line}"
        if (first := self.seen.setdefault(identity, where)) != where:
            self.found(path, line, f"id {identity} was used before, at {first}")

    def _trajectory(
        self, number: int, path: Path, line: int, trajectory: Trajectory, *, imported: bool = False
    ) -> None:
        self._unique(path, line, trajectory.id)
        if trajectory.round != number:
            self.found(path, line, f"{trajectory.id} says round {trajectory.round}")
        if not imported and not 1 <= len(trajectory.turns) <= self.config.env.max_turns:
            self.found(path, line, f"{trajectory.id} has {len(trajectory.turns)} turns")
        for turn, (now, then) in enumerate(itertools.pairwise(trajectory.turns)):
            if now.feedback != then.observation:
                feedback = f"{trajectory.id}: the feedback of turn {turn}"
                self.found(path, line, f"{feedback} is not what turn {turn + 1} shows")

    def _training_games(
        self, number: int, files: RoundFiles, entry: StageEntry, split: TrainingSplit, planned: int | None = None
    ) -> None:
        """`planned` is None for games from elsewhere, which nobody planned."""
        path = files.trajectories(split)
        self._count(path, entry, split, len(_lines(path)))
        trajectories = self._records(path, Trajectory)
        if planned is not None:
            ids = [training_id(number, split, place) for place in range(planned)]
            self._as_planned(path, trajectories, ids, self._deployed(number), "episodes")
        for line, trajectory in trajectories:
            self._trajectory(number, path, line, trajectory, imported=planned is None)
            if trajectory.split != split:
                self.found(path, line, f"{trajectory.id} says split {trajectory.split}")
            self.collected.setdefault(self._map(trajectory), trajectory.id)

    def _knowledge(self, number: int, files: RoundFiles, entry: StageEntry, *, imported: bool = False) -> None:
        paths = files.knowledge_files()
        folder = files.knowledge(0).parent
        self._count(folder, entry, "knowledge", len(paths))
        if not imported:
            self._planned(folder, len(paths), self.config.extract.seeds, "knowledge texts")
        extraction = {game.id for game in _parsed(files.trajectories("extraction"), Trajectory)}
        for path in paths:
            try:
                text = KnowledgeText.from_json(path.read_bytes())
            except ValidationError as error:
                self.found(path, 0, f"is not a KnowledgeText: {first_problem(error)}")
                continue
            self._unique(path, 1, text.id)
            if text.round != number:
                self.found(path, 0, f"{text.id} says round {text.round}")
            if join_items([item.text for item in text.items]) != text.text:
                self.found(path, 0, f"the text of {text.id} is not its items joined")
            if not imported:
                self._accumulation(path, text, extraction)

    def _accumulation(self, path: Path, text: KnowledgeText, extraction: set[str]) -> None:
        if [step.index for step in text.steps] != list(range(len(text.steps))):
            self.found(path, 0, f"the steps of {text.id} are not numbered 0 to {len(text.steps) - 1}")
        read = [step.trajectory_id for step in text.steps]
        for identity in sorted({*read, *(item.trajectory_id for item in text.items)} - extraction):
            self.found(path, 0, f"{text.id} refers to {identity}, which is no extraction trajectory of this round")
        if missing := extraction - set(read):
            self.found(path, 0, f"{text.id} read {len(set(read))} trajectories and left {len(missing)} out")
        if len(set(read)) < len(read):
            self.found(path, 0, f"{text.id} read a trajectory twice")
        steps = [step for step in text.steps if step.trajectory_id not in text.withdrawn]
        added = [(item, step.trajectory_id) for step in steps for item in step.added]
        items = [(item.text, item.trajectory_id) for item in text.items]
        if items != added[len(added) - len(items) :]:
            self.found(path, 0, f"the items of {text.id} are not the last ones that its steps added")

    def _consolidate(self, number: int, files: RoundFiles, entry: StageEntry) -> None:
        path = files.consolidation_metrics
        steps = self._records(path, StepRow)
        self._count(path, entry, "metrics", len(_lines(path)))
        self._planned(path, len(steps), self.config.consolidate.steps, "steps")
        for (_, before), (line, row) in itertools.pairwise(steps):
            if row.step != before.step + 1:
                self.found(path, line, f"step {row.step} follows step {before.step}")
        self._steps(path, number, steps)

        path = files.samples
        prefixes = {
            prefix_id(trajectory.id, turn)
            for trajectory in _parsed(files.trajectories("consolidation"), Trajectory)
            for turn in range(len(trajectory.turns))
        }
        knowledge = {text.id for file in files.knowledge_files() for text in _parsed(file, KnowledgeText)}
        step_rows = {row.step: row for _, row in steps}
        self._count(path, entry, "samples", len(_lines(path)))
        for line, sample in self._records(path, SampleRow):
            self._unique(path, line, f"sample of {sample.prefix_id}")
            if sample.prefix_id not in prefixes:
                self.found(path, line, f"prefix {sample.prefix_id} is no turn of a consolidation trajectory")
            if sample.knowledge_id and sample.knowledge_id not in knowledge:
                self.found(path, line, f"knowledge text {sample.knowledge_id} does not exist")
            if sample.step not in step_rows:
                self.found(path, line, f"step {sample.step} is not in {files.consolidation_metrics.name}")
            elif sample.weight_version != (wanted := step_rows[sample.step].generated_by):
                self.found(path, line, f"written by weights {sample.weight_version}, the step's were {wanted}")
            elif sample.kl is None and step_rows[sample.step].applied:
                self.found(path, line, f"step {sample.step} was applied, and this KL is not finite")

    def _steps(self, path: Path, number: int, steps: list[tuple[int, StepRow]]) -> None:
        """Each step's responses come from the weights that the engines served then, and weights never get older.

        Only a step that was skipped may lack a finite loss. An attempt that goes on from a checkpoint sends its weights
        again, under its own number.
        """
        settings, last = self.config.consolidate, StepVersion(0, 0, 0)
        deployed = self._deployed(number)
        sent = [deployed]
        for line, row in steps:
            if row.applied and None in (row.loss, row.kl_per_token):
                self.found(path, line, f"step {row.step} was applied, and its loss or KL is not finite")
            if _sent_again(row.generated_by, sent[-1]):
                sent = [row.generated_by]
            served = deployed if settings.responses == "teacher" else sent[max(-len(sent), -1 - settings.max_staleness)]
            if row.generated_by != served:
                self.found(path, line, f"generated by weights {row.generated_by}, the engines served {served}")
            sent.append(row.weight_version)
            version = StepVersion.parse(row.weight_version)
            if version is None:
                self.found(path, line, f"'{row.weight_version}' is not a weight version")
            elif version[:2] <= last[:2] or version[2] < last[2]:
                self.found(path, line, f"weight version {row.weight_version} is not newer than the one before it")
            last = version or last

    def _games(
        self, number: int, path: Path, condition: str, entry: StageEntry, steps: Sequence[int | None] = (None,)
    ) -> _Games:
        """The games of a file, with the success that the replay gives, where there is one.

        `steps` are the steps of the accumulations that are to be played, nothing for the bare policy.
        """
        settings = self.config.evaluate
        self._count(path, entry, path.stem, len(_lines(path)))
        records = self._records(path, EvaluationGame)
        version = self._deployed(number) if condition == "in_context" else policy_version(number)
        ids = evaluation_ids(number, steps, settings.maps, settings.seeds)
        self._as_planned(path, records, ids, version, "games")
        games = []
        for line, game in records:
            self._trajectory(number, path, line, game)
            if game.condition != condition or game.split != "held_out":
                self.found(path, line, f"{game.id} says condition {game.condition}, split {game.split}")
            self.held_out.append((path, line, game))
            if game.knowledge_step not in steps:
                self.found(path, line, f"{game.id} says knowledge after {game.knowledge_step} steps, planned: {steps}")
            games.append(game.model_copy(update={"success": self._replayed(path, line, game)}))
        maps = len({self._map(game) for game in games})
        if games and maps != settings.maps:
            self.found(path, 0, f"holds {maps} distinct maps, planned were {settings.maps}")
        return games

    def _map(self, trajectory: Trajectory) -> str:
        """What tells the run's maps apart: their content, or only their seed, as the official code has it."""
        by_seed = self.config.env.split == "paper"
        return f"seed {trajectory.seed}" if by_seed else f"map {trajectory.map_hash}"

    def _replayed(self, path: Path, line: int, game: EvaluationGame) -> bool:
        if self.replay is None:
            return game.success
        success, difference = self.replay(game)
        if success != game.success:
            self.found(path, line, f"{game.id} says success={game.success}, its replay gives {success}")
        if difference:
            self.found(path, line, f"the replay differs: {difference}")
        return success

    def _deployed(self, number: int) -> str:
        """The weight version of the policy that a round starts with."""
        # What is damaged is reported where it is checked.
        with contextlib.suppress(OSError, UserError, ValueError, KeyError):
            return policy_version(self.folder.deployed(number))
        return policy_version(number - 1)

    def _gate(self, number: int, path: Path, recorded: Gate | None, games: _Games) -> None:
        """Which policy is deployed follows from the games of both."""
        expected = None
        if self.config.gate.enabled and number:
            old = int(self._deployed(number)[1:])
            before = [*_parsed(self.folder.files(old).evaluation_games, EvaluationGame)]
            expected = passed_gate(old, before, number, games, self.config.gate) if before and games else recorded
        if recorded != expected:
            self.found(path, 0, f"the gate says '{recorded}', the games give '{expected}'")

    def _evaluation(self, number: int, path: Path, games: _Games, in_context: _Games | None) -> None:
        try:
            recorded = Evaluation.from_json(path.read_bytes())
        except OSError as error:
            self.found(path, 0, f"cannot be read: {error!r}")
            return
        except ValidationError as error:
            self.found(path, 0, f"is not an Evaluation: {first_problem(error)}")
            return
        self._score(path, "", recorded, games)
        self._gate(number, path, recorded.gate, games)
        if (recorded.in_context is None) != (in_context is None):
            self.found(path, 0, "in_context and the games that were kept do not go together")
        elif recorded.in_context is not None and in_context is not None:
            *earlier, complete = by_step(in_context).items() or [(0, [])]
            self._score(path, "in_context.", recorded.in_context, complete[1])
            scores = {score.step: score for score in recorded.in_context_steps}
            if list(scores) != [step for step, _ in earlier]:
                self.found(path, 0, f"in_context_steps has {list(scores)}, the games {[step for step, _ in earlier]}")
            for step, played in earlier:
                if step in scores:
                    self._score(path, f"in_context_steps.{step}.", scores[step], played)

    def _score(self, path: Path, name: str, recorded: Score, games: _Games) -> None:
        if not games:
            self.found(path, 0, f"{name}games is {recorded.games}, the games give 0")
            return
        for key, value in score(games).model_dump().items():
            there = getattr(recorded, key)
            if not math.isclose(there, value, abs_tol=TOLERANCE):
                self.found(path, 0, f"{name}{key} is {there}, the games give {value:.6g}")


def _sent_again(label: str, before: str) -> bool:
    """Whether both are the weights of one step, sent by a later attempt."""
    ours, theirs = StepVersion.parse(label), StepVersion.parse(before)
    return bool(ours and theirs and ours[:2] == theirs[:2] and ours[2] > theirs[2])


def _lines(path: Path) -> list[tuple[int, bytes]]:
    """Numbered lines; none for a missing file, which the manifest check reports."""
    return list(enumerate(path.read_bytes().splitlines(), start=1)) if path.is_file() else []


def _parsed(path: Path, kind: type[AnyRecord]) -> Iterator[AnyRecord]:
    """The lines that fit; the others are reported where they are checked."""
    for _, text in _lines(path):
        with contextlib.suppress(ValidationError):
            yield kind.model_validate_json(text)
