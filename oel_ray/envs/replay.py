"""Plays recorded responses again and compares. Runs in `oel verify --replay`, in the main thread."""

from oel_ray.envs.registry import make
from oel_ray.prompts import with_result
from oel_ray.records import Trajectory


def replay(trajectory: Trajectory) -> tuple[bool, str]:
    """Whether the recorded game was won, and the first difference between record and game ("" if they agree)."""
    environment = make(trajectory.env, trajectory.seed, trajectory.params)
    shown = environment.reset()
    for name, recorded, real in (
        ("map_hash", trajectory.map_hash, environment.map_hash),
        ("instructions", trajectory.instructions, environment.instructions),
    ):
        if recorded != real:
            return False, _difference(trajectory, name, recorded, real)

    done, outcome = False, ""
    for number, turn in enumerate(trajectory.turns, start=1):
        if done:
            return environment.success(), _difference(trajectory, f"turn {number}", "a response", "the game was over")
        step = environment.step(turn.response)
        for name, recorded, real in (
            ("observation", turn.observation, shown),
            ("action", turn.action, step.action),
            ("feedback", turn.feedback, step.feedback),
        ):
            if recorded != real:
                return environment.success(), _difference(trajectory, f"turn {number}, {name}", recorded, real)
        shown, done, outcome = step.feedback, step.done, step.outcome

    ended = trajectory.ended_by == "environment"
    if ended != done:
        real = "the game was over" if done else "the game goes on"
        return environment.success(), _difference(trajectory, "ended_by", trajectory.ended_by, real)
    if ended and trajectory.outcome not in (outcome, with_result(outcome, won=environment.success())):
        return environment.success(), _difference(trajectory, "outcome", trajectory.outcome, outcome)
    return environment.success(), ""


def _difference(trajectory: Trajectory, where: str, recorded: str, real: str) -> str:
    return f"{trajectory.id}, {where}: recorded {recorded[:200]!r}, replayed {real[:200]!r}"
