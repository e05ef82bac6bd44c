"""A training rank whose memory runs out, in a process of its own: `memory_worker.py STORE_FILE RANK WORLD_SIZE OUTPUT`.

Every rank leaves what it saw in OUTPUT/rank-R.pt.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

KINDS = [(0, "float32", "all"), (1, "float32", "all"), (2, "float32", "all"), (2, "bfloat16", "all")]
KINDS += [(0, "float32", "adapters"), (2, "bfloat16", "adapters")]
ZERO_3 = (3, "float32", "all")
PLACES = ["teacher", "forward", "backward"]


class Shortage:
    """Runs out of memory at a place, as often as it is told to, in the second micro-batch of a step."""

    def __init__(self, step: Any, place: str, times: int, *, here: bool) -> None:
        self.step, self.place, self.left = step, place, times if here else 0
        self.calls = 0
        if place == "teacher":
            self._wrap(step.teacher, "hidden")
        elif place == "forward":
            self._wrap(step, "_pass")
        else:  # behind some of the gradients, before others
            next(p for p in step.student.parameters() if p.requires_grad).register_hook(self._look)

    def _look(self, gradient: Any) -> None:
        self.calls += 1
        if self.left and self.calls >= 2:
            self.left, self.calls = self.left - 1, 0
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    def _wrap(self, owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            samples = getattr(arguments[0], "samples", arguments[0])
            if samples and samples[0].response_ids:  # there is room for a filler
                self.calls += self.place == "teacher"  # which is asked once in a step
                self._look(None)
            return real(*arguments, **keywords)

        setattr(owner, name, wrapped)


def main(store: str, rank: int, world_size: int, output: Path) -> None:
    from oel_ray.distill.gather import FullWeights
    from oel_ray.errors import RunFailed
    from tests.support.training_worker import prepare

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    last = rank == world_size - 1
    results: dict[Any, Any] = {}
    for stage, precision, what in [*KINDS, ZERO_3]:
        places = ["teacher"] if stage == 3 else PLACES
        for place, times in [("nowhere", 0), *((place, 1) for place in places), *[("forward", 2)] * (stage < 3)]:
            step, batches = prepare("tied", stage, precision, rank, world_size, adapters=what == "adapters")
            if times:
                Shortage(step, place, times, here=last)
            seen = []
            for batch in batches[:2]:
                for _ in range(3):
                    metrics = step.step(batch)
                    seen.append(metrics.loss if metrics else step.shortage)
                    if metrics:
                        break
            weights = (
                step.student.named_parameters() if what == "adapters" else FullWeights(step.student, torch.float32)
            )
            results[stage, precision, what, place, times] = seen, {n: w.detach().clone() for n, w in weights}
    step, batches = prepare("tied", 3, "float32", rank, world_size)
    Shortage(step, "forward", 1, here=True)  # on all ranks, or the others would wait for ever
    try:
        step.step(batches[0])
    except RunFailed as error:
        results["stage 3"] = str(error)
    torch.save(results, output / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
