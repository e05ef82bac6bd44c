"""`python -m benchmarks.loss_memory`: transient memory of the loss with its backward pass, naive / ours.

Every measure has a process of its own. The naive way needs five tensors of [tokens, vocabulary].
"""

from collections.abc import Callable
from dataclasses import asdict

from benchmarks import harness
from benchmarks.losses import LossBenchmark, LossCase, Way, main


def _gauge(case: LossCase) -> Callable[[Way], float]:
    def gibibytes(way: Way) -> float:
        return harness.transient_bytes("benchmarks.losses:prepare", case.device, {"way": way, **asdict(case)}) / 2**30

    return gibibytes


BENCHMARK = LossBenchmark("loss_memory", ">= 10", "GiB", "naive", "ours", _gauge)

if __name__ == "__main__":
    main(BENCHMARK)
