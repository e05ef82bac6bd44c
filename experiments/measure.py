"""From finished runs to the points of a result. Runs in the process of an experiment; reads files alone."""

import math
from collections.abc import Iterator
from pathlib import Path

from experiments.records import Condition, Point
from oel_ray.play.scores import Evaluation, Score
from oel_ray.records import KnowledgeText, Record, content_hash
from oel_ray.runs.files import fingerprint, read_json
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.layout import POLICY_REFERENCE

_GROWTH = 0.9
"""How far into a round its knowledge has grown; the rest is left to consolidation."""


class Measured(Record):
    """What was measured of a model folder outside a run: the share that went right, its standard error, of how many."""

    rate: float
    error: float
    count: int
    tokens_per_turn: float | None = None

    @classmethod
    def of_shares(cls, right: int, count: int, tokens_per_turn: float | None = None) -> "Measured":
        """From independent tries."""
        rate = right / count
        return cls(rate=rate, error=math.sqrt(rate * (1 - rate) / count), count=count, tokens_per_turn=tokens_per_turn)


def evaluation(folder: RunFolder, number: int) -> Evaluation:
    """What a run says of a round's policy."""
    return Evaluation.from_json(folder.files(number).evaluation.read_bytes())


def model_hash(folder: RunFolder) -> str:
    """Of the untouched model's files, wherever it lies."""
    return content_hash(read_json(folder.files(0).policy / POLICY_REFERENCE)["files"])


def run_points(folder: RunFolder, rounds: int, root: Path) -> Iterator[Point]:
    """The evaluations of the first rounds of a run. `root` is what sources are named below."""
    games = folder.config.collect.extraction_games
    for number in range(rounds + 1):
        path, result = folder.files(number).evaluation, evaluation(folder, number)
        yield _point(result, "policy", number, None, number, path, root)
        for score in result.in_context_steps:
            place = number - 1 + _GROWTH * score.step / games
            yield _point(score, "in_context", number, score.step, place, path, root)
        if result.in_context:
            yield _point(result.in_context, "in_context", number, None, number - 1 + _GROWTH, path, root)


def kept_point(played: RunFolder, number: int, step: int, steps: int, root: Path) -> Point:
    """How a policy plays that was kept after `step` of the `steps` of a round, from a run that evaluated it alone."""
    path = played.files(0).evaluation
    return _point(evaluation(played, 0), "policy", number, step, number - 1 + step / steps, path, root)


def measured_point(path: Path, number: int, step: int | None, steps: int, root: Path) -> Point:
    """What a file says of the policy after a round, or after `step` of its `steps`."""
    it = Measured.from_json(path.read_bytes())
    return Point(
        condition="out_of_distribution",
        round=number,
        step=step,
        place=number if step is None else number - 1 + step / steps,
        rate=it.rate,
        error=it.error,
        count=it.count,
        tokens_per_turn=it.tokens_per_turn,
        **_source(path, root),
    )


def knowledge_tokens(folder: RunFolder, rounds: int) -> dict[int, float]:
    """Mean length of a round's knowledge texts, in tokens."""
    return {number: sum(it.tokens for it in texts) / len(texts) for number, texts in _knowledge(folder, rounds).items()}


def knowledge_hash(folder: RunFolder, rounds: int) -> dict[int, str]:
    """Of the words of a round's knowledge texts, whoever wrote them."""
    return {number: content_hash(*(it.text for it in texts)) for number, texts in _knowledge(folder, rounds).items()}


def _knowledge(folder: RunFolder, rounds: int) -> dict[int, list[KnowledgeText]]:
    return {number: folder.files(number).knowledge_texts() for number in range(1, rounds + 1)}


def wall_seconds(folder: RunFolder, rounds: int) -> float:
    """Of the stages of the first rounds."""
    stages = [entry for number in range(rounds + 1) for entry in folder.manifest(number).stages.values()]
    return round(sum(entry.wall_s for entry in stages), 1)


def _point(
    score: Score, condition: Condition, number: int, step: int | None, place: float, path: Path, root: Path
) -> Point:
    return Point(
        condition=condition,
        round=number,
        step=step,
        place=place,
        rate=score.pass_rate,
        error=score.pass_rate_se,
        count=score.games,
        tokens_per_turn=score.response_tokens_per_turn,
        **_source(path, root),
    )


def _source(path: Path, root: Path) -> dict[str, str]:
    return {"source": path.absolute().relative_to(root.absolute()).as_posix(), "sha256": fingerprint(path).sha256[:16]}
