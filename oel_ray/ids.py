"""The ids of the games that a run plays: each tells a game's place in the plan. Any process; pure."""

from collections.abc import Sequence

from oel_ray.records import TrainingSplit

_LETTERS: dict[TrainingSplit, str] = {"extraction": "x", "consolidation": "c"}


def training_id(round_number: int, split: TrainingSplit, number: int) -> str:
    return f"r{round_number:03d}-{_LETTERS[split]}-{number:04d}"


def held_out_id(number: int) -> str:
    return f"h-{number:04d}"


def evaluation_ids(round_number: int, steps: Sequence[int | None], maps: int, seeds: int) -> list[str]:
    """The games of an evaluation, in order.

    `steps` says how many trajectories had been read for each set of texts in the prompt, the last of which is complete;
    [None] is the bare policy.
    """
    return [
        f"r{round_number:03d}-{'p' if step is None else 'k'}-{held_out_id(number)}-s{seed}"
        + (f"-n{step}" if step != steps[-1] else "")
        for step in steps
        for number in range(maps)
        for seed in range(seeds)
    ]


def knowledge_id(round_number: int, seed_index: int) -> str:
    return f"r{round_number:03d}-k{seed_index:02d}"
