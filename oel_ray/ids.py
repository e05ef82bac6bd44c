"""Build ids of games, texts and prefixes, and labels of weights, from their place in the plan. Any process; pure."""

import re
from collections.abc import Sequence
from typing import NamedTuple, Self

from oel_ray.records import TrainingSplit

_LETTERS: dict[TrainingSplit, str] = {"extraction": "x", "consolidation": "c"}


def training_id(round_number: int, split: TrainingSplit, number: int) -> str:
    return f"r{round_number:03d}-{_LETTERS[split]}-{number:04d}"


def held_out_id(number: int) -> str:
    return f"h-{number:04d}"


def evaluation_ids(round_number: int, steps: Sequence[int | None], maps: int, seeds: int) -> list[str]:
    """List the ids of an evaluation's games, in order.

    `steps` holds, for each set of texts in the prompt, the number of trajectories read for it. The last set is
    complete. [None] is the bare policy.
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


def prefix_id(trajectory_id: str, turn: int) -> str:
    return f"{trajectory_id}/{turn}"


def policy_version(round_number: int) -> str:
    """Label the weights of the policy that a round ended with."""
    return f"r{round_number:03d}"


class StepVersion(NamedTuple):
    """The label of the weights after a training step of one attempt of a training group."""

    round: int
    step: int
    attempt: int

    def __str__(self) -> str:
        return f"{policy_version(self.round)}.s{self.step:04d}.a{self.attempt}"

    @classmethod
    def parse(cls, label: str) -> Self | None:
        """Read a label; None if it is not the label of a step."""
        match = _STEP_VERSION.fullmatch(label)
        return cls(*map(int, match.groups())) if match else None


_STEP_VERSION = re.compile(r"r(\d+)\.s(\d+)\.a(\d+)")
