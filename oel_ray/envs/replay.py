"""Replay recorded responses and compare. Runs in `oel verify --replay`, in the main thread."""

from collections.abc import Iterator

from oel_ray.envs.base import Environment
from oel_ray.envs.registry import make
from oel_ray.records import Trajectory
from oel_ray.text.prompts import with_result


def replay(trajectory: Trajectory) -> tuple[bool, str]:
    """Replay a recorded game. Returns whether it was won, and its first difference from the record ("" if none)."""
    environment = make(trajectory.env, trajectory.seed, trajectory.params)
    for where, recorded, real in _compared(trajectory, environment):
        if recorded != real:
            difference = f"{trajectory.id}, {where}: recorded {recorded[:200]!r}, replayed {real[:200]!r}"
            return environment.success(), difference
    return environment.success(), ""


def _compared(trajectory: Trajectory, environment: Environment) -> Iterator[tuple[str, str, str]]:
    """Replay the game and yield (place, recorded value, replayed value). The caller stops at the first difference."""
    shown, done, outcome = environment.reset(), False, ""
    yield "map_hash", trajectory.map_hash, environment.map_hash
    yield "instructions", trajectory.instructions, environment.instructions
    for number, turn in enumerate(trajectory.turns, start=1):
        if done:
            yield f"turn {number}", "a response", "the game was over"
        step = environment.step(turn.response)
        yield f"turn {number}, observation", turn.observation, shown
        yield f"turn {number}, action", turn.action, step.action
        yield f"turn {number}, feedback", turn.feedback, step.feedback
        shown, done, outcome = step.feedback, step.done, step.outcome
    ended = trajectory.ended_by == "environment"
    if ended != done:
        yield "ended_by", trajectory.ended_by, "the game was over" if done else "the game goes on"
    if ended and trajectory.outcome not in (outcome, with_result(outcome, won=environment.success())):
        yield "outcome", trajectory.outcome, outcome
