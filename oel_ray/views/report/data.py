"""What the report shows, read from a run folder. Any process; imports no Ray, torch or vLLM."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from oel_ray.play.scores import Evaluation, Score, by_step, score
from oel_ray.records import EvaluationGame, KnowledgeText, Trajectory, read_jsonl
from oel_ray.runs import layout
from oel_ray.runs.files import read_json
from oel_ray.runs.folder import RunFolder
from oel_ray.text.prompts import ITEM_MARKER
from oel_ray.views.show import remarks, state_of, training_steps

Z = 1.96
"""Standard errors on either side of a 95 % interval."""


class Item(NamedTuple):
    """A statement of a knowledge text: how often it was written, and the trajectories that it came from."""

    text: str
    times: int
    sources: list[str]


class Knowledge(NamedTuple):
    """A knowledge text with equal items put together, most frequent first; `read` trajectories went into it."""

    id: str
    read: int
    tokens: int
    items: list[Item]

    @property
    def length(self) -> int:
        """Items, equal ones counted as often as they are written."""
        return sum(item.times for item in self.items)


class RoundData(NamedTuple):
    """What a round left behind so far. `policy` is how the round's last policy plays; None is "not yet".

    `began_with` is the round whose policy it started from. `in_context` has that policy's scores, with knowledge from
    so many trajectories in its prompt: the last one is with the complete knowledge. `read` are the trajectories that
    its knowledge came from. `kl` has None for a step whose KL was not finite.
    """

    number: int
    began_with: int
    policy: Evaluation | None
    in_context: dict[int, Score]
    kl: list[float | None]
    seconds: dict[str, float]
    counts: dict[str, int]
    knowledge: list[Knowledge]
    read: dict[str, Trajectory]

    @property
    def with_all_knowledge(self) -> Score | None:
        return self.in_context[max(self.in_context)] if self.in_context else None

    @property
    def items_per_text(self) -> float | None:
        texts = self.knowledge
        return sum(text.length for text in texts) / len(texts) if texts else None


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
    remarks: list[str]

    @property
    def evaluated(self) -> list[tuple[int, Evaluation]]:
        """Round and evaluation, of the rounds that have one."""
        return [(data.number, data.policy) for data in self.rounds if data.policy]

    @property
    def headline(self) -> str:
        """What the run did to the policy, in a sentence or two."""
        if not self.evaluated:
            return "No policy has been evaluated yet."
        (start, first), (end, last) = self.evaluated[0], self.evaluated[-1]
        rates = (("a random player", last.random), ("a perfect one", last.oracle))
        players = ", ".join(f"{name} {100 * rate:.0f} %" for name, rate in rates if rate is not None)
        beside = "95 % interval" + (f"; {players}" if players else "")
        if start == end:
            return f"The policy wins {interval(first)} of the held-out games {when(start)} ({beside})."
        text = (
            f"The policy wins {interval(first)} of the held-out games {when(start)} and {interval(last)} {when(end)} "
            f"({beside.replace('interval', 'intervals', 1)})."
        )
        before, after = first.response_tokens_per_turn, last.response_tokens_per_turn
        if before:
            text += f" Its responses have {before:.1f} tokens per turn {when(start)} and {after:.1f} {when(end)}, "
            text += f"{after / before:.2f} times as many."
        return text


def interval(value: Score) -> str:
    """A pass rate with its 95 % interval, e.g. "42 ± 6 %"."""
    return f"{100 * value.pass_rate:.0f} ± {100 * Z * value.pass_rate_se:.0f} %"


def when(number: int) -> str:
    """The moment at which a round's policy is there."""
    return f"after round {number}" if number else "before"


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
    games = [
        read_jsonl(folder.files(number).evaluation_games, EvaluationGame) for number in evaluated[:1] + evaluated[-1:]
    ]
    return Report(
        run=folder.path.resolve().name,
        model=config.model,
        environment=f"{config.env.id} ({params})" if params else config.env.id,
        state=state_of(read_json(folder.path / layout.STATUS_FILE)),
        planned_rounds=config.rounds,
        rounds=rounds,
        pairs=choose_pairs(games[0], games[-1], pairs) if len(evaluated) > 1 else [],
        remarks=remarks(path),
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
    played = read_jsonl(files.in_context, EvaluationGame) if layout.EVALUATE_IN_CONTEXT in stages else []
    texts = files.knowledge_texts() if {layout.EXTRACT, layout.IMPORT_KNOWLEDGE} & set(stages) else []
    has_games = {layout.COLLECT, layout.IMPORT_EXTRACTION} & set(stages)
    read = read_jsonl(files.trajectories("extraction"), Trajectory) if has_games else []
    return RoundData(
        number=number,
        began_with=folder.deployed(number),
        policy=Evaluation.from_json(files.evaluation.read_bytes()) if layout.EVALUATE in stages else None,
        in_context={step: score(games) for step, games in by_step(played).items()},
        kl=[row.kl_per_token for row in training_steps(folder, number)],
        seconds={name: entry.wall_s for name, entry in stages.items()},
        counts={name: count for entry in stages.values() for name, count in entry.counts.items()},
        knowledge=[*map(_knowledge, texts)],
        read={game.id: game for game in read},
    )


def _knowledge(text: KnowledgeText) -> Knowledge:
    sources: dict[str, list[str]] = defaultdict(list)
    for item in text.items:
        sources[item.text].append(item.trajectory_id)
    items = [
        Item(statement.removeprefix(ITEM_MARKER).strip(), len(ids), list(dict.fromkeys(ids)))
        for statement, ids in sorted(sources.items(), key=lambda entry: -len(entry[1]))
    ]
    return Knowledge(text.id, len(text.steps), text.tokens, items)
