"""Randomly initialised models and random samples for them. The process of a benchmark."""

import random
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from oel_ray.distill.batches import Sample

HEAD = 20
"""Tokens of a prompt that stand before the knowledge."""
QWEN3_1_7B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}


def qwen3_like(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """Values of a configuration in the proportions of Qwen3's small models."""
    heads = max(width // 64, 2)
    return QWEN3_1_7B | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": width // heads,
    }


def random_model(values: dict[str, Any], device: str = "cpu") -> Any:
    """A Qwen3 model in float32 with torch's attention, always the same one."""
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM(Qwen3Config(**values, attn_implementation="sdpa"))


def random_samples(
    count: int, vocabulary: int, *, texts: int = 1, knowledge: int, prompt: int, response: int
) -> list[Sample]:
    """Samples of one length, the knowledge texts taking turns. `prompt` counts the head as well."""
    rng = random.Random(0)

    def tokens(number: int) -> list[int]:
        return rng.choices(range(1, vocabulary), k=number)

    head = tokens(HEAD)
    known = [(*head, *tokens(knowledge)) for _ in range(texts)]
    return [
        Sample(str(n), [*head, *tokens(prompt - HEAD)], HEAD, known[n % texts], tokens(response)) for n in range(count)
    ]
