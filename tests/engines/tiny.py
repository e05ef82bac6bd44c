"""A tiny random policy that changes, its Hugging Face folders, and what plain transformers says about them."""

import random
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from oel_ray.config import EnginesConfig
from oel_ray.consolidate.weights import FullWeights, export_policy
from tests.tokenizers_for_tests import small_tokenizer

CONTEXT = 1024


def engines_config(dtype: str, **values: Any) -> EnginesConfig:
    return EnginesConfig.model_validate(
        {"dtype": dtype, "max_model_len": CONTEXT, "max_num_seqs": 16, "sync_deadline_s": 60.0, **values}
    )


def tiny_model(kind: str, seed: int) -> Any:
    """`kind` is "tied" or "untied": a float32 Qwen3 with a tied head, a Llama with its own. In eval mode."""
    size: dict[str, Any] = {
        "vocab_size": len(small_tokenizer()),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        # Wide enough that other weights are another policy, and that a stale cache block is seen behind it.
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    if kind == "tied":
        model: Any = Qwen3ForCausalLM(Qwen3Config(**size, tie_word_embeddings=True))  # type: ignore[no-untyped-call]
    else:
        model = LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=False))  # type: ignore[no-untyped-call]
    return model.eval()


class Student:
    """A model whose weights change in place, as in training. `first` is the folder that engines start from."""

    def __init__(self, kind: str, dtype: str, folder: Path) -> None:
        self.kind = kind
        self.dtype = dtype
        self._folder = folder
        self._model = tiny_model(kind, seed=0)
        self.weights = FullWeights(self._model, getattr(torch, dtype))
        self.first = folder / "first"
        tiny_model(kind, seed=0).to(getattr(torch, dtype)).save_pretrained(self.first)
        small_tokenizer().save_pretrained(str(self.first))

    def become(self, seed: int) -> Path:
        """Take quite other weights, all of them; returns the folder that they were exported to."""
        self._model.load_state_dict(tiny_model(self.kind, seed).state_dict())
        target = self._folder / f"policy-{seed}"
        export_policy(self.weights, self.first, target)
        return target


class Without:
    """Weights that leave some tensors out."""

    def __init__(self, weights: FullWeights, names: Collection[str]) -> None:
        self._weights = weights
        self._names = names

    def metadata(self) -> list[Any]:
        return [row for row in self._weights.metadata() if row[0] not in self._names]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return (row for row in self._weights if row[0] not in self._names)


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, 500) for _ in range(length)]


PROMPTS = [prompt(1, 300), prompt(2, 411), prompt(3, 640)]


@torch.no_grad()
def plain_logprobs(folder: Path, dtype: str, token_ids: list[int]) -> torch.Tensor:
    """[position, vocabulary]: what comes after every token, by an ordinary forward pass of the folder's model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits.float().log_softmax(-1)
