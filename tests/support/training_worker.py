"""One training rank in a process of its own: `worker.py STORE_FILE RANK WORLD_SIZE OUTPUT`.

Runs all cases one after the other in one process group, because starting processes costs more than the cases. Every
rank leaves what it saw in OUTPUT/rank-R.pt.
"""

import logging
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

FLOAT32 = [(kind, stage, "float32") for kind in ("tied", "untied") for stage in (0, 2, 3)]
BFLOAT16 = [("tied", 1, "bfloat16"), ("tied", 3, "bfloat16"), ("untied", 2, "bfloat16"), ("untied", 3, "bfloat16")]
DIVERGENCES = [("untied", 3, "top_k"), ("tied", 2, "top_k_tail"), ("tied", 3, "forward")]
LIVE = [("tied", 0, "float32"), ("untied", 2, "float32"), ("tied", 3, "float32"), ("untied", 3, "bfloat16")]
WITHOUT_KNOWLEDGE = [("tied", 3, "float32"), ("untied", 2, "bfloat16")]
PACKED = [("tied", 2), ("untied", 3)]
STEPS = 4
SAMPLES = 7


def settings(stage: int, precision: str, world_size: int, divergence: str = "full") -> Any:
    from oel_ray.config.schema import ConsolidateConfig

    return ConsolidateConfig.model_validate(
        {
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "workers": world_size,
            "zero_stage": stage,
            "precision": precision,
            "micro_batch_tokens": 30,
            "chunk_tokens": 5,
            "kl_temperature": 0.7,
            "divergence": divergence,
            "top_k": 9,
        }
    )


def step_samples(index: int, *, knowledge: bool = True) -> Any:
    """The last step has one sample for all ranks: the others get nothing but fillers.

    All samples have knowledge or none has: where some have none, a few weights have a gradient that is rounding alone,
    and AdamW makes a whole step of it.
    """
    from tests.support.tiny_training import HEAD, KNOWLEDGE, tiny_samples

    count = 1 if index == STEPS - 1 else SAMPLES
    return tiny_samples(count, seed=index, texts=KNOWLEDGE[1:] if knowledge else [HEAD])


def main(store: str, rank: int, world_size: int, output: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    partition_everything()
    results: dict[Any, Any] = {}
    for case in FLOAT32 + (BFLOAT16 if world_size > 1 else []):
        results[case] = run_case(*case, rank, world_size, output)
    for kind, stage, divergence in DIVERGENCES:
        step, batches = prepare(kind, stage, "float32", rank, world_size, divergence=divergence)
        results[kind, stage, divergence] = [step.step(batch).loss for batch in batches]
    for case in LIVE:
        step, batches = prepare(*case, rank, world_size, live_teacher=True)
        results["live", *case] = [step.step(batch).loss for batch in batches]
    for case in WITHOUT_KNOWLEDGE:
        step, batches = prepare(*case, rank, world_size, knowledge=False)
        results["without knowledge", *case] = step.step(batches[0]).loss
    for kind, stage in PACKED:
        step, batches = prepare(kind, stage, "float32", rank, world_size, packing="always")
        results["packed", kind] = [step.step(batch).loss for batch in batches]
        step, batches = prepare(kind, stage, "float32", rank, world_size, knowledge=False, packing="always")
        results["packed without knowledge", kind] = step.step(batches[0]).loss
    torch.save(results, output / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def partition_everything() -> None:
    """ZeRO-3 leaves parameters as small as a tiny model's on every rank, unless told to partition them all."""
    from oel_ray.distill import step

    real = step.deepspeed_config

    def changed(config: Any, world_size: int, device: str) -> dict[str, Any]:
        settings = real(config, world_size, device)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return settings

    step.deepspeed_config = changed


def prepare(
    kind: Any,
    stage: int,
    precision: str,
    rank: int,
    world_size: int,
    *,
    knowledge: bool = True,
    divergence: str = "full",
    packing: str = "auto",
    live_teacher: bool = False,
    adapters: bool = False,
) -> tuple[Any, Any]:
    """The step, and the micro-batches of all steps.

    With `packing` the student attends in another way than the teacher does by itself, as with flash attention.
    """
    from oel_ray.config.schema import LoraConfig
    from oel_ray.distill.batches import micro_batches
    from oel_ray.distill.lora import add_adapters, sharing_weights
    from oel_ray.distill.step import DistillStep
    from tests.support.tiny_training import tiny_model

    changes = {"packing": packing, "live_teacher": live_teacher}
    config = settings(stage, precision, world_size, divergence).model_copy(update=changes)
    student = tiny_model(kind, seed=1)
    if packing == "always":
        student.set_attn_implementation("eager")
    teacher = tiny_model(kind, seed=1)
    if adapters:
        student = student.to(getattr(torch, precision))
        teacher = sharing_weights(student)
        add_adapters(student, LoraConfig(rank=4), seed=7)
    step = DistillStep(student, teacher, config, "cpu")
    samples = [step_samples(index, knowledge=knowledge) for index in range(STEPS)]
    tokens = config.micro_batch_tokens
    return step, [micro_batches(batch, rank, world_size, tokens, packed=step.packs) for batch in samples]


def run_case(kind: Any, stage: int, precision: str, rank: int, world_size: int, output: Path) -> dict[Any, Any]:
    from oel_ray.distill.batches import MicroBatch
    from oel_ray.distill.gather import FullWeights
    from oel_ray.weights.export import export_policy
    from tests.support.tiny_training import tiny_model

    step, batches = prepare(kind, stage, precision, rank, world_size)

    # A loss that is not a number on the last rank alone; all ranks have to go on as if nothing had been.
    spoilt = batches[0]
    if rank == world_size - 1:
        first = spoilt[0]
        spoilt = [MicroBatch(first.samples, tuple(float("nan") for _ in first.weights)), *spoilt[1:]]
    skipped = step.step(spoilt)
    result: dict[Any, Any] = {"skipped": asdict(skipped), "start": copied(FullWeights(step.student, torch.float32))}

    result["metrics"] = []
    for index, batch in enumerate(batches):
        result["metrics"].append(asdict(step.step(batch)))
        if index == 0:
            result["gradients"] = first_gradients(step)
    for dtype in (torch.float32, torch.bfloat16):
        weights = FullWeights(step.student, dtype, bucket_numel=5000)
        result[dtype] = {"metadata": weights.metadata(), "weights": copied(weights)}
    source, target = output / f"source-{kind}", output / f"{kind}-{stage}-{precision}"
    if rank == 0 and not source.exists():
        tiny_model(kind, seed=1).save_pretrained(source)
        (source / "chat_template.jinja").write_text("{{ messages }}")
    export_policy(FullWeights(step.student, torch.bfloat16), source, target, max_shard_bytes=30_000)
    return result


def copied(weights: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights}


def first_gradients(step: Any) -> dict[str, torch.Tensor]:
    """The clipped gradients of the first step. AdamW's first moment is a tenth of them, wherever ZeRO keeps it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    gradients = {}
    for name, parameter in step.student.named_parameters():
        if step.engine.zero_optimization_stage() == 0:
            moment = step.engine.optimizer.state[parameter]["exp_avg"]
        else:
            moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        gradients[name] = moment.detach().clone() * 10
    return gradients


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
