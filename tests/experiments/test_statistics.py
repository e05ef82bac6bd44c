"""Intervals against tables, and what they decide."""

import math

import pytest

from experiments.statistics import estimate, t_quantile, verdict

# Two-sided 95 %, as any table of Student's t has them.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 19: 2.093, 29: 2.045, 119: 1.980}


@pytest.mark.parametrize(("freedom", "quantile"), TABLE.items())
def test_quantiles_are_those_of_the_table(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=6e-4)


def test_an_interval_is_as_wide_as_repetitions_differ() -> None:
    it = estimate([1.0, 2.0, 3.0])
    assert (it.mean, it.repetitions) == (2.0, 3)
    assert it.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert estimate([5.0, 5.0]).half == 0
    assert math.isinf(estimate([5.0]).half)


@pytest.mark.parametrize(
    ("differences", "within", "said"),
    [
        ([0.10, 0.11, 0.12], None, "holds here"),
        ([-0.10, -0.11, -0.12], None, "does not hold here"),
        ([0.10, 0.11, -0.05], None, "cannot be told apart"),
        ([0.0, 0.0, 0.0], None, "cannot be told apart"),
        ([0.10], None, "cannot be told apart"),
        ([], None, "cannot be told apart"),
        ([0.01, -0.01, 0.0], 0.05, "holds here"),
        ([0.10, 0.11, 0.12], 0.05, "does not hold here"),
        ([-0.10, -0.11, -0.12], 0.05, "does not hold here"),
        ([0.01, 0.10, -0.03], 0.05, "cannot be told apart"),
    ],
)
def test_a_claim_is_decided_by_the_whole_interval(differences: list[float], within: float | None, said: str) -> None:
    assert verdict(differences, within) == said
