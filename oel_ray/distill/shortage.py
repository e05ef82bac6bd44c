"""Recognise and describe out-of-memory errors. Runs in the training ranks."""

from typing import Any

import torch

from oel_ray.config.schema import ConsolidateConfig
from oel_ray.distill.memory import rank_memory
from oel_ray.distill.teacher import Teacher
from oel_ray.formats import gib


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means out of memory. The CPU allocator raises a plain RuntimeError for that."""
    said = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


def memory_report(
    config: ConsolidateConfig, student: Any, teacher: Teacher, ranks: int, largest_pass: tuple[int, int]
) -> str:
    """List the memory of a rank in a step: the permanent parts, and the largest temporary ones.

    `largest_pass` holds rows and tokens per row. Weights that the student shares with the teacher count as the
    teacher's.
    """
    shared = {id(p) for p in teacher.model.parameters()}
    own = [p for p in student.parameters() if id(p) not in shared]
    numel, trained = (
        sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
        for parameters in (own, [p for p in own if p.requires_grad])
    )
    lying = rank_memory(config, numel, trained, ranks) | {
        "teacher": sum(p.numel() * p.element_size() for p in teacher.model.parameters()),
        "its kept texts": teacher.caches.device_size,
    }
    rows, width = largest_pass
    head = student.get_output_embeddings().weight
    words, hidden = getattr(head, "ds_shape", head.shape)
    logits = config.chunk_tokens * words * 4
    parts = [f"{name} {gib(count)}" for name, count in lying.items()]
    return (
        f"{', '.join(parts)}; the largest micro-batch is {rows} x {width} tokens of width {hidden}, and a chunk of "
        f"logits {config.chunk_tokens} x {words} words, {gib(logits)}. Lower consolidate.micro_batch_tokens, "
        "chunk_tokens or teacher_cache_gib, raise zero_stage or workers, or set offload_optimizer"
    )
