"""A tiny random policy that changes, its Hugging Face folders, and what plain transformers says about them."""

import random
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from oel_ray.config.schema import EnginesConfig
from oel_ray.distill.gather import FullWeights, weights_of
from oel_ray.models.resolve import resolve_model
from oel_ray.runs.files import read_json
from oel_ray.weights.export import export_policy
from tests.support.tiny_models import store_head, tiny_model
from tests.support.tokenizers_for_tests import small_tokenizer

CONTEXT = 1024
MICRO = resolve_model("micro", print)
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim", "rope_parameters")


def engines_config(dtype: str, **values: Any) -> EnginesConfig:
    return EnginesConfig.model_validate(
        {"dtype": dtype, "max_model_len": CONTEXT, "max_num_seqs": 16, "sync_deadline_s": 60.0, **values}
    )


def family_model(kind: str, seed: int) -> Any:
    """`kind` is a family and its head, such as "gemma3-untied"; or "tied" or "stored", a Qwen3, or "untied", a Llama.

    A "stored" head is tied, and the folder holds a copy of it. The family "micro" has the shape of the packaged model.
    """
    kinds = {"tied": "qwen3-tied", "stored": "qwen3-stored", "untied": "llama-untied"}
    family, _, head = kinds.get(kind, kind).partition("-")
    tokenizer = small_tokenizer()
    shape = {key: value for key, value in read_json(MICRO / "config.json").items() if key in SHAPE}
    return tiny_model(
        "qwen3" if family == "micro" else family,
        vocab_size=len(tokenizer) + 40,  # real models have rows for more words than their tokenizer knows
        tied=head != "untied",
        seed=seed,
        max_position_embeddings=CONTEXT,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape if family == "micro" else {},
    )


class Student:
    """A model whose weights change in place, as in training. `first` is the folder that engines start from."""

    def __init__(self, kind: str, dtype: str, folder: Path) -> None:
        self.kind = kind
        self.dtype = dtype
        self._folder = folder
        self._model = family_model(kind, seed=0)
        self.first = folder / "first"
        family_model(kind, seed=0).to(getattr(torch, dtype)).save_pretrained(self.first)
        small_tokenizer().save_pretrained(str(self.first))
        if kind.endswith("stored"):
            store_head(self.first)
        self.weights = weights_of(self._model, getattr(torch, dtype), self.first)

    def become(self, seed: int) -> Path:
        """Take quite other weights, all of them; returns the folder that they were exported to."""
        self._model.load_state_dict(family_model(self.kind, seed).state_dict())
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
    logits: torch.Tensor = _plain_model(folder, dtype)(torch.tensor([token_ids])).logits[0]
    return logits.float().log_softmax(-1)


def is_greedy(folder: Path, prompt_ids: list[int], token_ids: list[int], tolerance: float) -> bool:
    """Whether all tokens of a response are those that the folder's model finds likeliest, in float32."""
    after = plain_logprobs(folder, "float32", prompt_ids + token_ids)[len(prompt_ids) - 1 : -1]
    chosen = after[torch.arange(len(token_ids)), torch.tensor(token_ids)]
    return bool((after.max(-1).values - chosen < tolerance).all())


@lru_cache(maxsize=2)
def _plain_model(folder: Path, dtype: str) -> Any:
    # Eager: the only attention of transformers that knows every family's soft caps.
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True
    )
