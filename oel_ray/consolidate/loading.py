"""A policy as the trainer holds it. Training workers (Ray Train group); needs no Ray itself."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, utils

from oel_ray.config.schema import LoraConfig
from oel_ray.consolidate.lora import layers_to_adapt
from oel_ray.plan import ModelSize


def model_without_weights(folder: Path) -> Any:
    """The folder's model with its layers and their names, and no memory behind its parameters."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))


def model_size(folder: Path, teacher: Path, lora: LoraConfig | None) -> ModelSize:
    """What a student from a folder, held against a teacher from another or the same one, will need memory for."""
    model = model_without_weights(folder)
    text, numel = model.config.get_text_config(), _numel(model)
    heads = getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    values = 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * width
    if not lora:
        return ModelSize(numel, values, own=numel, trained=numel, teacher=_numel(model_without_weights(teacher)))
    adapters = sum(lora.rank * sum(model.get_submodule(name).weight.shape) for name in layers_to_adapt(model, lora))
    own = adapters + (numel if teacher != folder else 0)
    return ModelSize(numel, values, own=own, trained=adapters, teacher=_numel(model_without_weights(teacher)))


def _numel(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def use_flash_attention(model: Any) -> None:
    """Have the model read with flash attention, if its package is installed and the model attends as it can."""
    if model._supports_flash_attn and model.config._attn_implementation == "sdpa" and utils.is_flash_attn_2_available():
        model.set_attn_implementation("flash_attention_2")


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """The folder's model, set to compute what the engines compute."""
    utils.logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    # transformers' default attention, torch's own, silently leaves out a soft cap on the attention scores (Gemma 2).
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, local_files_only=True
    )
