"""Make the student, its teacher, and the step that distils one into the other. Runs in the training ranks."""

from pathlib import Path

import torch

from oel_ray.config.schema import ConsolidateConfig
from oel_ray.distill.lora import add_adapters, load_adapters, sharing_weights
from oel_ray.distill.step import DistillStep
from oel_ray.models.load import load_model, use_flash_attention


def build_step(
    config: ConsolidateConfig,
    policy: Path,
    teacher_folder: Path,
    device: torch.device,
    *,
    trained: Path | None = None,
    adapter_seed: int = 0,
) -> DistillStep:
    """Load a student from a policy, and its teacher, with adapters if they are configured.

    `trained` holds weights to resume with, of the whole model or of the adapters. Without it the masters come from the
    policy.
    """
    precision = getattr(torch, config.precision)
    if config.lora is None:
        student = load_model(trained or policy, torch.float32)
        teacher = load_model(teacher_folder, precision)
    else:
        student = load_model(policy, precision)
        teacher = sharing_weights(student) if teacher_folder == policy else load_model(teacher_folder, precision)
        add_adapters(student, config.lora, adapter_seed)
        if trained:
            load_adapters(student, trained)
    if device.type == "cuda" and precision == torch.bfloat16 and config.packing != "never":
        use_flash_attention(student)
    return DistillStep(student, teacher, config, device)
