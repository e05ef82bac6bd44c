"""Load a policy for the trainer. Training workers (Ray Train group); needs no Ray itself."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, utils


def model_without_weights(folder: Path) -> Any:
    """Build the folder's model with its layers and their names, without memory for its parameters."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))


def use_flash_attention(model: Any) -> None:
    """Switch the model to flash attention, if the package is installed and supports the model's attention."""
    if model._supports_flash_attn and model.config._attn_implementation == "sdpa" and utils.is_flash_attn_2_available():
        model.set_attn_implementation("flash_attention_2")


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """Load the folder's model, set to compute the same function as the engines."""
    utils.logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    # transformers' default attention (torch's own) silently omits a soft cap on the attention scores (Gemma 2).
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, local_files_only=True
    )
