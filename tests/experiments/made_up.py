"""Results that nobody measured, for the tests of what is made of results."""

from experiments.records import ArmResult, Condition, Point

RISE = {0: 0.1, 1: 0.3, 2: 0.6, 3: 0.7}


def point(condition: Condition, number: int, step: int | None, rate: float, tokens: float | None = 100.0) -> Point:
    place = number - (0.1 if condition == "in_context" else 0.0) - (0.5 if step else 0.0)
    return Point(
        condition=condition,
        round=number,
        step=step,
        place=place,
        rate=rate,
        error=0.03,
        count=64,
        tokens_per_turn=tokens,
        source=f"base/seed-0/rounds/{number:03d}/evaluation.json",
        sha256="0" * 16,
    )


def result(experiment: str, arm: str, seed: int, points: list[Point], **changes: str) -> ArmResult:
    values = {
        "experiment": experiment,
        "arm": arm,
        "preset": "quickstart",
        "settings": (),
        "arms": (arm,),
        "seeds": (seed,),
        "seed": seed,
        "command": "oel run quickstart",
        "run_id": f"{seed:08d}",
        "settings_hash": "a" * 16,
        "model_hash": "c" * 16,
        "packages": {"oel-ray": "1.0"},
        "machine": "two cores",
        "wall_s": 600.0,
        "knowledge_tokens": {1: 200.0},
        "knowledge_hash": {1: f"{arm}-{seed}"},
        "random": 0.012,
        "oracle": 1.0,
        "points": tuple(points),
    }
    return ArmResult.model_validate(values | changes)


def rounds(seed: int) -> ArmResult:
    """Rising round after round, much the same with any seed; knowledge does better in the prompt than in the weights.

    Of accumulation there is one step between nothing and all, and it does as well as all.
    """
    noise = 0.01 * seed
    points = [point("policy", number, None, rate + noise, 120 - 10 * number) for number, rate in RISE.items()]
    points += [point("in_context", number, None, RISE[number] + 0.05 - noise, 90) for number in (1, 2, 3)]
    points += [point("in_context", 1, 4, RISE[1] + 0.05 - noise, 95)]
    return result("rounds", "oel", seed, points)
