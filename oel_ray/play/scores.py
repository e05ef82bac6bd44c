"""From evaluation games to the numbers of `evaluation.json`. Any process; pure functions."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from oel_ray.config.schema import GateConfig
from oel_ray.records import EvaluationGame, Gate, Record


class Score(Record):
    """How one condition did. `seeds` counts the sampling seeds; the standard error is clustered by map."""

    pass_rate: float
    pass_rate_se: float
    games: int
    seeds: int
    response_tokens_per_turn: float


class StepScore(Score):
    """With the knowledge as it was after so many trajectories."""

    step: int


class Evaluation(Score):
    """`evaluation.json`: the bare policy's score, and what to read it against.

    `random` and `oracle` are those players' pass rates on the same maps; `in_context` is the policy with knowledge in
    its prompt. Each is null where it does not exist. `in_context_steps` has the scores with the knowledge of earlier
    steps. `gate` is null where every policy is deployed.
    """

    random: float | None
    oracle: float | None
    in_context: Score | None
    in_context_steps: tuple[StepScore, ...] = ()
    gate: Gate | None = None


def score(games: Sequence[EvaluationGame]) -> Score:
    """The score of the games of one condition; there must be at least one.

    The pass rate is the share of games won. Its standard error has maps as clusters, since games on one map are no
    independent draws: the sample deviation of the maps' own pass rates over the root of their number; 0 for a single
    map. A response's end token counts; without any turn the length is 0.
    """
    lengths = [len(turn.response_ids) for game in games for turn in game.turns]
    return Score(
        pass_rate=statistics.fmean(game.success for game in games),
        pass_rate_se=_standard_error([*_rates_by_map(games).values()]),
        games=len(games),
        seeds=len({game.sampling_seed for game in games}),
        response_tokens_per_turn=statistics.fmean(lengths) if lengths else 0.0,
    )


def summarize(
    policy: Sequence[EvaluationGame],
    in_context: Sequence[EvaluationGame],
    *,
    random: float | None,
    oracle: float | None,
    gate: Gate | None = None,
) -> Evaluation:
    """What `evaluation.json` holds; no `in_context` games give null there."""
    steps = by_step(in_context)
    complete = steps.pop(max(steps), None) if steps else None
    return Evaluation(
        **score(policy).model_dump(),
        random=random,
        oracle=oracle,
        in_context=score(complete) if complete else None,
        in_context_steps=tuple(StepScore(step=step, **score(games).model_dump()) for step, games in steps.items()),
        gate=gate,
    )


def passed_gate(
    old_round: int, old: Sequence[EvaluationGame], new_round: int, new: Sequence[EvaluationGame], config: GateConfig
) -> Gate:
    """Hold a new policy against the deployed one, map by map; there must be a map that both played."""
    before, after = _rates_by_map(old), _rates_by_map(new)
    differences = [rate - before[name] for name, rate in after.items() if name in before]
    difference, error = statistics.fmean(differences), _standard_error(differences)
    lost = -difference > config.max_loss + config.standard_errors * error
    return Gate(old=old_round, difference=difference, difference_se=error, deployed=old_round if lost else new_round)


def by_step(in_context: Sequence[EvaluationGame]) -> dict[int, list[EvaluationGame]]:
    """Games by how many trajectories had been read for the text in their prompt, in order: complete texts come last."""
    steps: dict[int, list[EvaluationGame]] = defaultdict(list)
    for game in in_context:
        steps[game.knowledge_step or 0].append(game)
    return dict(sorted(steps.items()))


def _rates_by_map(games: Sequence[EvaluationGame]) -> dict[str, float]:
    by_map: dict[str, list[bool]] = defaultdict(list)
    for game in games:
        by_map[game.map_hash].append(game.success)
    return {name: statistics.fmean(wins) for name, wins in by_map.items()}


def _standard_error(means: Sequence[float]) -> float:
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
