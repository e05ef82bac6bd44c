"""One training rank with adapters, in a process of its own: `lora_worker.py STORE_FILE RANK WORLD_SIZE OUTPUT`.

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

CASES = [("tied", 0, "float32"), ("untied", 2, "float32"), ("tied", 2, "bfloat16"), ("untied", 1, "bfloat16")]
STEPS = 10
RANK, ALPHA, SEED = 4, 8.0, 7
TOKENS = [[5, 6, 7, 8, 9]]


def settings(stage: int, precision: str, world_size: int) -> Any:
    from oel_ray.config.schema import ConsolidateConfig

    return ConsolidateConfig.model_validate(
        {
            "lora": {"rank": RANK, "alpha": ALPHA},
            "learning_rate": 1e-2,
            "workers": world_size,
            "zero_stage": stage,
            "precision": precision,
            "micro_batch_tokens": 60,
            "chunk_tokens": 5,
            "kl_temperature": 0.7,
        }
    )


def step_samples(*, knowledge: bool = True) -> Any:
    """The same in every step: seven for all ranks, so that one of two has a filler."""
    from tests.support.tiny_training import HEAD, KNOWLEDGE, tiny_samples

    return tiny_samples(7, seed=0, texts=KNOWLEDGE[1:] if knowledge else [HEAD])


def main(store: str, rank: int, world_size: int, output: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    results = {case: run_case(*case, rank, world_size, output) for case in CASES}
    torch.save(results, output / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_case(kind: str, stage: int, precision: str, rank: int, world_size: int, output: Path) -> dict[str, Any]:
    from oel_ray.distill.batches import micro_batches
    from oel_ray.distill.gather import weights_of
    from oel_ray.distill.lora import add_adapters, sharing_weights
    from oel_ray.distill.step import DistillStep
    from oel_ray.models.load import load_model
    from oel_ray.weights.export import export_policy
    from tests.support.tiny_training import tiny_model

    config = settings(stage, precision, world_size)
    source = output / f"source-{kind}"
    if rank == 0 and not source.exists():
        tiny_model(kind, seed=1).save_pretrained(source)
    dist.barrier()
    student = load_model(source, getattr(torch, precision))
    teacher = sharing_weights(student)
    torch.manual_seed(rank)  # what the rank drew before must not matter
    add_adapters(student, config.lora, SEED)
    step = DistillStep(student, teacher, config, "cpu")
    weights = weights_of(step.student, torch.float32, source)
    result: dict[str, Any] = {"start": copied(weights), "trained": []}

    def share(**kind_of: Any) -> Any:
        return micro_batches(step_samples(**kind_of), rank, world_size, config.micro_batch_tokens)

    before = {name: p.detach().clone() for name, p in step.student.named_parameters()}
    result["teacher"] = [step.teacher.hidden(step_samples())]
    result["losses"] = [step.step(share()).loss for _ in range(STEPS)]
    result["teacher"].append(step.teacher.hidden(step_samples()))
    for name, parameter in step.student.named_parameters():
        if not torch.equal(parameter, before[name]):
            result["trained"].append(name)
    result["gradients"] = [n for n, p in step.student.named_parameters() if not p.requires_grad and p.grad is not None]
    frozen = {p.data_ptr() for p in step.student.parameters() if not p.requires_grad}
    result["shared"] = frozen == {p.data_ptr() for p in step.teacher.model.parameters()}
    with torch.no_grad():
        result["logits"] = step.student(torch.tensor(TOKENS)).logits
    result["weights"] = copied(weights)
    result["metadata"] = weights.metadata()
    export_policy(weights, source, output / "-".join(map(str, (kind, stage, precision))))
    rounded = weights_of(step.student, torch.bfloat16, source)
    result["rounded"] = copied(rounded)

    fresh = load_model(source, getattr(torch, precision))
    teacher = sharing_weights(fresh)
    add_adapters(fresh, config.lora, SEED)
    result["without knowledge"] = DistillStep(fresh, teacher, config, "cpu").step(share(knowledge=False)).loss
    return result


def copied(weights: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
