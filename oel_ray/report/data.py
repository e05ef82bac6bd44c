"""What the report shows, read from a run folder. Any process; imports no Ray, torch or vLLM."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import orjson

from oel_ray.durable import read_json
from oel_ray.evaluate.metrics import Evaluation, Score, by_step, score
from oel_ray.layout import COLLECT, CONSOLIDATE, EVALUATE, EVALUATE_IN_CONTEXT, EXTRACT, STATUS_FILE, RoundFiles
from oel_ray.records import EvaluationGame, KnowledgeText, Trajectory, read_jsonl
from oel_ray.runs import RunFolder

Z = 1.96
"""Standard errors on either side of a 95 % interval."""

SOURCES = 3
"""Trajectories that are shown behind an item; the others are counted."""


class Item(NamedTuple):
    """A statement of a knowledge text: how often it was written, and the first trajectories that it came from."""

    text: str
    times: int
    sources: list[Trajectory]


class Knowledge(NamedTuple):
    """A knowledge text with equal items put together, most frequent first; `read` trajectories went into it."""

    id: str
    read: int
    tokens: int
    items: list[Item]


class RoundData(NamedTuple):
    """What a round left behind so far. `policy` is how the round's last policy plays; None is "not yet"."""

    number: int
    policy: Evaluation | None
    in_context: Score | None
    kl: list[float]
    seconds: dict[str, float]
    counts: dict[str, int]
    knowledge: list[Knowledge]


class Pair(NamedTuple):
    """One held-out map, played by the first policy and by the last with the same sampling seed."""

    before: EvaluationGame
    after: EvaluationGame


class Report(NamedTuple):
    """Everything that the page shows."""

    run: str
    model: str
    environment: str
    state: str
    planned_rounds: int
    rounds: list[RoundData]
    pairs: list[Pair]

    @property
    def evaluated(self) -> list[tuple[int, Evaluation]]:
        """Round and evaluation, of the rounds that have one."""
        return [(data.number, data.policy) for data in self.rounds if data.policy]

    @property
    def headline(self) -> str:
        """What the run did to the policy, in a sentence or two."""
        if len(self.evaluated) < 2:
            return "There are not two evaluations to compare yet."
        (_, first), (number, last) = self.evaluated[0], self.evaluated[-1]
        text = (
            f"Pass rate on held-out games: {interval(first)} before, {interval(last)} after round {number} "
            "(95 % intervals, clustered by map)."
        )
        if first.response_tokens_per_turn:
            ratio = last.response_tokens_per_turn / first.response_tokens_per_turn
            text += f" Responses have {ratio:.2f} times the tokens that they had."
        return text


def interval(value: Score) -> str:
    """A pass rate with its 95 % interval, e.g. "42 ± 6 %"."""
    return f"{100 * value.pass_rate:.0f} ± {100 * Z * value.pass_rate_se:.0f} %"


def read_report(path: Path, pairs: int = 3) -> Report:
    """Read a run, finished or not.

    Raises:
        UserError: no run lies at `path`.
    """
    folder = RunFolder.open(path)
    rounds = [_round(folder, number) for number in folder.rounds()]
    config = folder.config
    params = ", ".join(f"{key}={value}" for key, value in config.env.params.items())
    evaluated = [data.number for data in rounds if data.policy]
    games = [read_jsonl(folder.files(number).evaluation_games, EvaluationGame) for number in evaluated]
    return Report(
        run=folder.path.resolve().name,
        model=config.model,
        environment=f"{config.env.id} ({params})" if params else config.env.id,
        state=str(read_json(folder.path / STATUS_FILE)["state"]),
        planned_rounds=config.rounds,
        rounds=rounds,
        pairs=choose_pairs(games[0], games[-1], pairs) if len(games) > 1 else [],
    )


def choose_pairs(before: Sequence[EvaluationGame], after: Sequence[EvaluationGame], count: int) -> list[Pair]:
    """Games to look at, each on another map: a lost one that is now won, one that is not won, others."""
    last = {(game.map_hash, game.sampling_seed): game for game in after}
    pairs = [Pair(game, last[key]) for game in before if (key := (game.map_hash, game.sampling_seed)) in last]

    def kind(pair: Pair) -> int:
        return [(False, True), (False, False), (True, False), (True, True)].index(
            (pair.before.success, pair.after.success)
        )

    chosen: list[Pair] = []
    while len(chosen) < count:
        maps, kinds = {pair.before.map_hash for pair in chosen}, Counter(map(kind, chosen))
        left = [pair for pair in pairs if pair.before.map_hash not in maps]
        if not left:
            break
        chosen.append(min(left, key=lambda pair: (kinds[kind(pair)], kind(pair))))
    return chosen


def _round(folder: RunFolder, number: int) -> RoundData:
    files, stages = folder.files(number), folder.manifest(number).stages
    kl, played = [], []
    if CONSOLIDATE in stages:
        kl = [
            float(orjson.loads(line)["kl_per_token"]) for line in files.consolidation_metrics.read_bytes().splitlines()
        ]
    if EVALUATE_IN_CONTEXT in stages:
        played = read_jsonl(files.in_context, EvaluationGame)
    counts = {name: count for entry in stages.values() for name, count in entry.counts.items()}
    return RoundData(
        number=number,
        policy=Evaluation.from_json(files.evaluation.read_bytes()) if EVALUATE in stages else None,
        in_context=score(list(by_step(played).values())[-1]) if played else None,
        kl=kl,
        seconds={name: entry.wall_s for name, entry in stages.items()},
        counts=counts,
        knowledge=_knowledge(files, collected=COLLECT in stages) if EXTRACT in stages else [],
    )


def _knowledge(files: RoundFiles, *, collected: bool) -> list[Knowledge]:
    games = read_jsonl(files.trajectories("extraction"), Trajectory) if collected else []
    known = {game.id: game for game in games}
    texts = [KnowledgeText.from_json(file.read_bytes()) for file in files.knowledge_files()]
    return [Knowledge(text.id, len(text.steps), text.tokens, _items(text, known)) for text in texts]


def _items(text: KnowledgeText, known: dict[str, Trajectory]) -> list[Item]:
    counts = Counter(item.text for item in text.items)
    behind = {
        statement: [
            known[item.trajectory_id] for item in text.items if item.text == statement and item.trajectory_id in known
        ]
        for statement in counts
    }
    return [Item(statement, count, behind[statement][:SOURCES]) for statement, count in counts.most_common()]
