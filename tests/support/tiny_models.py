"""Randomly initialised models of every supported family: real architectures, small enough for two cores."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from oel_ray.models.resolve import SMOLLM2, resolve_model

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    # Wide enough that other weights are another policy, and that a stale cache block is seen behind it.
    "initializer_range": 0.2,
}
# Windows far shorter than a prompt, and caps and scales that bite at this size.
_GEMMA: dict[str, Any] = {"head_dim": 64}
_WINDOWS: dict[str, Any] = {**_GEMMA, "sliding_window": 48, "query_pre_attn_scalar": 48, "num_hidden_layers": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3"},
    "llama": {"model_type": "llama"},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "gemma": {"model_type": "gemma", **_GEMMA},
    "gemma2": {
        "model_type": "gemma2",
        **_WINDOWS,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **_WINDOWS,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    },
}

# The way Qwen3 and its kin speak: the model may think, unless it finds an empty thought already there.
THINKING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Gemma's way: text begins with <bos>, the assistant is a "model", and nobody is the system.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_EMPTY_THOUGHT = "{% if add_generation_prompt and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"


def tiny_model(family: str, *, vocab_size: int, tied: bool, seed: int, **values: Any) -> Any:
    """A float32 model of a family in which every tensor is random, norms as well. In eval mode."""
    settings = {**SIZES, **FAMILIES[family], "vocab_size": vocab_size, "tie_word_embeddings": tied, **values}
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # all zeros or all ones so far
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def store_head(folder: Path) -> None:
    """Put a copy of the tied head beside the embedding, as the folders of Qwen3-0.6B and 1.7B have one."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})


def family_tokenizer(family: str, *, thinking: bool) -> Any:
    """SmolLM2's words with the special tokens and the chat template of a family."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(SMOLLM2, print))
    if family.startswith("gemma"):
        tokenizer.add_special_tokens(
            {
                "bos_token": "<bos>",
                "eos_token": "<eos>",
                "pad_token": "<pad>",
                "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
            }
        )
        tokenizer.chat_template = GEMMA_TEMPLATE + _EMPTY_THOUGHT * thinking
    elif thinking:
        tokenizer.chat_template = THINKING_TEMPLATE
    if thinking:
        tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return tokenizer


def save_tiny_model(
    folder: Path,
    family: str = "qwen3",
    *,
    tied: bool = True,
    thinking: bool = False,
    closes_thoughts: bool = False,
    seed: int = 0,
) -> Path:
    """An HF folder with a tiny model of a family that answers anything with noise.

    `thinking` gives it a chat template that can switch thinking off. The model never closes a thought; one with a head
    of its own often does if told to (with a tied head it would then say nothing else).
    """
    tokenizer = family_tokenizer(family, thinking=thinking)
    ends = [tokenizer.eos_token_id]
    if family.startswith("gemma"):
        ends.append(tokenizer.convert_tokens_to_ids("<end_of_turn>"))
    model = tiny_model(
        family,
        vocab_size=len(tokenizer),
        tied=tied,
        seed=seed,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
    )
    if closes_thoughts:
        with torch.no_grad():
            model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids("</think>")] *= 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
