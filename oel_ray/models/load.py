"""A policy as the trainer holds it. Training workers (Ray Train group); needs no Ray itself."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, utils


def model_without_weights(folder: Path) -> Any:
    """The folder's model with its layers and their names, and no memory behind its parameters."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))


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
