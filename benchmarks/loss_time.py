"""`python -m benchmarks.loss_time`: wall time of the loss with its backward pass, ours / naive.

Both ways have the same inputs, and one call each that does not count.
"""

from typing import Any

from benchmarks import harness
from benchmarks.losses import AXES, LossCase, loss_with_backward
from benchmarks.sweep import Benchmark


def _compare(case: LossCase, runs: int) -> tuple[harness.Pairs, dict[str, Any]]:
    inputs = case.inputs()
    ours, naive = (loss_with_backward(way, case, inputs) for way in ("ours", "naive"))
    for warm_up in (ours, naive):
        warm_up()
    seconds = harness.seconds
    return harness.measure_pairs(lambda: seconds(ours, case.device), lambda: seconds(naive, case.device), runs), {}


BENCHMARK = Benchmark("loss_time", "<= 1.0", "s", "ours", "naive", LossCase(), _compare, AXES)

if __name__ == "__main__":
    BENCHMARK.main()
