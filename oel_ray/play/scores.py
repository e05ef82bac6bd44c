"""Compute the numbers of `evaluation.json` from evaluation games. Any process; pure functions."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from oel_ray.config.schema import GateConfig
from oel_ray.records import EvaluationGame, Gate, Record


class Score(Record):
    """The result of one condition. `seeds` counts the sampling seeds; the standard error is clustered by map."""

    pass_rate: float
    pass_rate_se: float
    games: int
    seeds: int
    response_tokens_per_turn: float


class StepScore(Score):
    """The score with the knowledge after `step` trajectories."""

    step: int


class Evaluation(Score):
    """`evaluation.json`: the bare policy's score and its baselines.

    `random` and `oracle` are the pass rates of those players on the same maps. `in_context` is the policy with
    knowledge in its prompt. Each is null if it does not exist. `in_context_steps` holds the scores with the knowledge
    of earlier steps. `gate` is null if every policy is deployed.
    """

    random: float | None
    oracle: float | None
    in_context: Score | None
    in_context_steps: tuple[StepScore, ...] = ()
    gate: Gate | None = None


def score(games: Sequence[EvaluationGame]) -> Score:
    """Score the games of one condition; there must be at least one.

    The pass rate is the share of games won. Its standard error is clustered by map, because games on one map are not
    independent draws. It is the sample deviation of the maps' pass rates divided by the root of their number, and 0 for
    a single map. A response's end token counts. Without any turn the length is 0.
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
    """Build the content of `evaluation.json`. Without `in_context` games that field is null."""
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
    """Compare a new policy with the deployed one, map by map; there must be a map that both played."""
    before, after = _rates_by_map(old), _rates_by_map(new)
    differences = [rate - before[name] for name, rate in after.items() if name in before]
    difference, error = statistics.fmean(differences), _standard_error(differences)
    lost = -difference > config.max_loss + config.standard_errors * error
    return Gate(old=old_round, difference=difference, difference_se=error, deployed=old_round if lost else new_round)


def by_step(in_context: Sequence[EvaluationGame]) -> dict[int, list[EvaluationGame]]:
    """Group games by the number of trajectories that their text was made from, in ascending order."""
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
