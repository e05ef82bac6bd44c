"""`python -m benchmarks.loss_time`: wall time of the loss with its backward pass, ours / naive.

Both ways have the same inputs, and one call each that does not count.
"""

from collections.abc import Callable

from benchmarks import harness
from benchmarks.losses import LossBenchmark, LossCase, Way, loss_with_backward, main


def _gauge(case: LossCase) -> Callable[[Way], float]:
    inputs = case.inputs()
    ways: dict[Way, Callable[[], None]] = {
        "naive": loss_with_backward("naive", case, inputs),
        "ours": loss_with_backward("ours", case, inputs),
    }
    for warm_up in ways.values():
        warm_up()
    return lambda way: harness.seconds(ways[way], case.device)


BENCHMARK = LossBenchmark("loss_time", "<= 1.0", "s", "ours", "naive", _gauge)

if __name__ == "__main__":
    main(BENCHMARK)
