"""Tiny random models and samples, built from configurations: nothing is downloaded."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from oel_ray.distill.batches import Sample

VOCABULARY = 128


def tiny_model(kind: str, seed: int) -> Any:
    """`kind` is "tied" or "untied": a float32 Qwen3 with a tied head, a Llama with its own. In eval mode."""
    size: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    if kind == "tied":
        model: Any = Qwen3ForCausalLM(Qwen3Config(**size, head_dim=16, tie_word_embeddings=True))  # type: ignore[no-untyped-call]
    else:
        model = LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=False))  # type: ignore[no-untyped-call]
    return model.eval()


HEAD = (3, 4)
KNOWLEDGE = [HEAD + tuple(range(5, 5 + 7 * length)) for length in (0, 1, 2, 3)]
"""The plain head with a text behind it; the first text is empty."""


def tiny_samples(count: int, seed: int, *, texts: Sequence[tuple[int, ...]] = KNOWLEDGE) -> list[Sample]:
    """Samples of mixed lengths, which the teacher reads with the texts in turn."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(low, high))]

    samples = []
    for index in range(count):
        prompt, response = [*HEAD, *tokens(1, 9)], tokens(1, 8)
        samples.append(Sample(f"sample-{index}", prompt, len(HEAD), texts[index % len(texts)], response))
    return samples
