"""`python -m benchmarks.loss_memory`: transient memory of the loss with its backward pass, naive / ours.

Every measure has a process of its own. The naive way needs five tensors of [tokens, vocabulary].
"""

from dataclasses import asdict
from typing import Any

from benchmarks import harness
from benchmarks.losses import AXES, LossCase, Way
from benchmarks.sweep import Benchmark


def _compare(case: LossCase, runs: int) -> tuple[harness.Pairs, dict[str, Any]]:
    def gibibytes(way: Way) -> float:
        return harness.transient_bytes("benchmarks.losses:prepare", case.device, {"way": way, **asdict(case)}) / 2**30

    return harness.measure_pairs(lambda: gibibytes("naive"), lambda: gibibytes("ours"), runs), {}


BENCHMARK = Benchmark("loss_memory", ">= 10", "GiB", "naive", "ours", LossCase(), _compare, AXES)

if __name__ == "__main__":
    BENCHMARK.main()
