import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import harness

MIB = 2**20


def allocates(mebibytes: int, held: int, passing: int) -> Callable[[], None]:
    """A setup: holds some memory, has had more for a moment; the function then takes `mebibytes` twice in turn."""
    kept = torch.ones(held * MIB // 4)
    torch.ones(passing * MIB // 4)

    def function() -> None:
        for _ in range(2):
            kept[0] = torch.ones(mebibytes * MIB // 4).sum()

    return function


@pytest.mark.process
@pytest.mark.parametrize(("held", "passing"), [(1, 1), (300, 1), (1, 500)])
def test_transient_memory_is_what_the_function_takes_and_no_more(held: int, passing: int) -> None:
    ballast = torch.ones(400 * MIB // 4)  # of the parent: none of the child's business
    arguments = {"mebibytes": 200, "held": held, "passing": passing}
    measured = harness.transient_bytes(f"{__name__}:allocates", "cpu", arguments)
    assert measured / MIB == pytest.approx(200, abs=15)
    assert len(ballast)


@pytest.mark.process
def test_a_process_that_fails_is_an_error() -> None:
    with pytest.raises(Exception, match="non-zero exit status"):
        harness.transient_bytes(f"{__name__}:no_such_setup", "cpu", {})


def test_the_ratio_is_of_the_medians_and_the_spread_of_the_pairs() -> None:
    pairs = harness.Pairs((4.0, 100.0, 6.0), (2.0, 4.0, 1.0))
    assert pairs.ratio == 3.0
    assert pairs.spread == (2.0, 25.0)


def test_pairs_are_measured_side_by_side_in_either_order() -> None:
    calls: list[str] = []

    def way(name: str, value: float) -> Callable[[], float]:
        def measure() -> float:
            calls.append(name)
            return value

        return measure

    pairs = harness.measure_pairs(way("a", 3.0), way("b", 2.0), runs=40)
    assert pairs == harness.Pairs((3.0,) * 40, (2.0,) * 40)
    orders = {tuple(calls[index : index + 2]) for index in range(0, 80, 2)}
    assert orders == {("a", "b"), ("b", "a")}


def test_a_result_holds_ratio_goal_spread_and_machine() -> None:
    machine = harness.machine("cpu")
    assert "cores" in machine and "torch" in machine
    line: dict[str, Any] = harness.result("x", harness.Pairs((4.0,), (2.0,)), ">= 2", machine, unit="s")
    assert json.loads(json.dumps(line)) == {
        "name": "x",
        "ratio": 2.0,
        "goal": ">= 2",
        "spread": [2.0, 2.0],
        "runs": 1,
        "machine": machine,
        "unit": "s",
    }
