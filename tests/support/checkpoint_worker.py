"""A rank that saves and goes on, in a process of its own: `checkpoint_worker.py STORE_FILE RANK WORLD_SIZE OUTPUT`.

Like `worker.py`: all cases in one process group, and every rank leaves what it saw in OUTPUT/rank-R.pt.
"""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ADAPTERS = [
    ("adapters", 0, "float32", False),
    ("adapters", 1, "bfloat16", False),
    ("adapters", 2, "bfloat16", False),
]
OFFLOADED = [("adapters", 1, "bfloat16", True), ("all", 2, "bfloat16", True), ("all", 3, "float32", True)]
CASES = [("all", 2, "bfloat16", False), ("all", 3, "float32", False), *ADAPTERS, *OFFLOADED]
"""(what is trained, ZeRO stage, precision, whether the optimizer lies on the host)."""
SAVED, STEPS = 2, 4


def main(store: str, rank: int, world_size: int, output: Path) -> None:
    from tests.support.tiny_training import tiny_model
    from tests.support.training_worker import partition_everything

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    partition_everything()
    if rank == 0:
        tiny_model("tied", seed=1).save_pretrained(output / "source")
    dist.barrier()
    torch.save({case: run_case(case, rank, world_size, output) for case in CASES}, output / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def begin(case: Any, world_size: int, source: Path) -> Any:
    from oel_ray.distill.lora import add_adapters, sharing_weights
    from oel_ray.distill.step import DistillStep
    from oel_ray.models.load import load_model
    from tests.support.lora_worker import SEED, settings

    what, stage, precision, offloaded = case
    lora = settings(0, precision, world_size).lora if what == "adapters" else None
    values = {"zero_stage": stage, "lora": lora, "offload_optimizer": offloaded}
    config = settings(0, precision, world_size).model_copy(update=values)
    student = load_model(source, getattr(torch, precision) if lora else torch.float32)
    teacher = sharing_weights(student) if lora else load_model(source, getattr(torch, precision))
    if lora:
        add_adapters(student, lora, SEED)
    return DistillStep(student, teacher, config, "cpu")


def run_case(case: Any, rank: int, world_size: int, output: Path) -> dict[str, Any]:
    from oel_ray.distill.batches import MicroBatch, micro_batches
    from oel_ray.distill.gather import save_adapters, weights_of
    from tests.support.lora_worker import copied, step_samples

    folder = output / "-".join(map(str, case))
    share = micro_batches(step_samples(), rank, world_size, 60)
    step = begin(case, world_size, output / "source")
    spoilt = [MicroBatch(share[0].samples, tuple(float("nan") for _ in share[0].weights)), *share[1:]]
    result: dict[str, Any] = {"teacher": [step.teacher.hidden(step_samples())], "losses": []}
    result["skipped"] = not step.step(spoilt if rank else share).applied
    for number in range(STEPS):
        if number == SAVED:
            step.save(folder / "deepspeed")
            if case[0] == "adapters":
                save_adapters(step.student, folder / "weights")
            result["saved"] = copied(weights_of(step.student, torch.float32, output / "source"))
        result["losses"].append(step.step(share).loss)
    result["weights"] = copied(weights_of(step.student, torch.float32, output / "source"))

    again = begin(case, world_size, output / "source")
    again.load(folder / "deepspeed")
    again.updates = SAVED
    result["losses again"] = [again.step(share).loss for _ in range(SAVED, STEPS)]
    result["weights again"] = copied(weights_of(again.student, torch.float32, output / "source"))
    result["teacher"].append(again.teacher.hidden(step_samples()))
    result["account"] = again.memory_report(share)
    return result


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
