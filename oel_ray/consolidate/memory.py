"""Running out of memory: how it shows, and a line on what took it. Training workers (Ray Train group); needs no Ray."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from oel_ray.config import ConsolidateConfig
from oel_ray.consolidate.batches import MicroBatch, pass_shape
from oel_ray.consolidate.teacher import Teacher
from oel_ray.plan import gib, rank_memory


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out: on a GPU, or on the CPU, whose allocator has no error of its own."""
    said = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


def account(
    student: Any,
    teacher: Teacher,
    config: ConsolidateConfig,
    micro_batches: Sequence[MicroBatch],
    *,
    ranks: int,
    packed: bool,
) -> str:
    """What takes a rank's memory in a step: what always lies there, and the largest of what comes and goes.

    Weights that the student shares with the teacher are the teacher's.
    """
    shared = {id(p) for p in teacher.model.parameters()}
    own = [p for p in student.parameters() if id(p) not in shared]
    numel, trained = (
        sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
        for parameters in (own, [p for p in own if p.requires_grad])
    )
    lying = rank_memory(config, numel, trained, ranks) | {
        "teacher": sum(p.numel() * p.element_size() for p in teacher.model.parameters()),
        "its kept texts": teacher.kept_bytes,
    }
    shapes = [pass_shape([s.student_tokens for s in batch.samples], packed=packed) for batch in micro_batches]
    rows, width = max(shapes, key=math.prod)
    head = student.get_output_embeddings().weight
    words, hidden = getattr(head, "ds_shape", head.shape)
    logits = config.chunk_tokens * words * 4
    parts = [f"{name} {gib(count)}" for name, count in lying.items()]
    return (
        f"{', '.join(parts)}; the largest micro-batch is {rows} x {width} tokens of width {hidden}, and a chunk of "
        f"logits {config.chunk_tokens} x {words} words, {gib(logits)}. Lower consolidate.micro_batch_tokens, "
        "chunk_tokens or teacher_cache_gib, raise zero_stage or workers, or set offload_optimizer"
    )
