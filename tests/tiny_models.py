"""Randomly initialised models with SmolLM2's tokenizer: real architectures, small enough for two cores."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from oel_ray.models import SMOLLM2, resolve_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "initializer_range": 0.2,
}


def save_tiny_model(folder: Path, family: str = "qwen3", *, tied: bool = True, seed: int = 0) -> Path:
    """An HF folder with a tiny model of a family ("qwen3", "llama") that answers anything with noise."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(SMOLLM2, print))
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SIZES,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
