"""Means over repetitions with 95 % intervals, and what they decide. Any process; pure."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

Verdict = Literal["holds here", "does not hold here", "cannot be told apart"]

_COVERED = 0.95
_INTERVALS = 2_000


class Estimate(NamedTuple):
    """A mean over repetitions. `half` is half the width of its 95 % interval, infinite for a single repetition."""

    mean: float
    half: float
    repetitions: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and t interval of independent repetitions, of which there must be one at least."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.inf, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, t_quantile(count - 1) * math.sqrt(variance / count), count)


def verdict(differences: Sequence[float], within: float | None = None) -> Verdict:
    """Whether paired differences, one per repetition, are positive on average; or, with `within`, that near to zero.

    It holds if the whole 95 % interval says so and does not if the whole interval says the opposite. Anything else,
    and less than two repetitions, cannot be told apart.
    """
    if len(differences) < 2:
        return "cannot be told apart"
    it = estimate(differences)
    if within is None:
        holds, fails = it.low > 0, it.high < 0
    else:
        holds, fails = -within <= it.low and it.high <= within, it.low > within or it.high < -within
    return "holds here" if holds else "does not hold here" if fails else "cannot be told apart"


def t_quantile(freedom: int) -> float:
    """Student's t with so many degrees of freedom lies between minus and plus this with probability 0.95."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < _COVERED else (low, middle)
    return (low + high) / 2


def _t_within(limit: float, freedom: int) -> float:
    """The probability of |t| <= limit. By t = sqrt(freedom) tan(angle) it is a smooth integral; Simpson's rule."""
    end = math.atan(limit / math.sqrt(freedom))
    width = end / _INTERVALS
    heights = [math.cos(index * width) ** (freedom - 1) for index in range(_INTERVALS + 1)]
    area = (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])) * width / 3
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return 2 * scale * area
