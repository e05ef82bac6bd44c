"""Run the teacher of a round. Training workers (Ray Train group); needs no Ray itself.

Shape suffixes: P tokens of a knowledge text, Q positions of a row after it, K both, T response tokens, E width.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from oel_ray.buckets import buckets
from oel_ray.distill.batches import Sample, length_groups
from oel_ray.distill.caches import Text, TextCache, TextCaches
from oel_ray.distill.inputs import lay_out, response_hidden
from oel_ray.models.capabilities import can_keep_texts

PASS_TOKENS = 1280
"""Tokens of one forward pass, enough to keep a device busy. Longer rows would mostly compute masked pairs of
positions."""


class Teacher:
    """The teacher model of one rank, and its caches of the knowledge texts."""

    def __init__(self, model: Any, *, device_bytes: float, host_bytes: float, pass_tokens: int = PASS_TOKENS) -> None:
        """`model` is on its device already; the budgets are those of `TextCaches`."""
        self.model = model
        self.pass_tokens = pass_tokens
        self.caches = TextCaches(self._read_text, model.device, device_bytes, host_bytes)
        self._keeps_texts = can_keep_texts(model)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the weights, given under the names of a checkpoint, and drop the stale caches."""
        own = self.model.state_dict()
        for name, tensor in weights:
            own[name].copy_(tensor)
        self.caches.clear()

    @torch.no_grad()
    def hidden(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Compute hidden_TE of every sample: the head's inputs at the positions that predict the response.

        Raises:
            ValueError: a sample has no knowledge ids, or no ids between them and its response.
        """
        head_VE = self.model.get_output_embeddings().weight
        found = [head_VE.new_empty(0, head_VE.shape[1])] * len(samples)
        wanted = [index for index, sample in enumerate(samples) if sample.response_ids]
        if not all(samples[index].knowledge_ids and samples[index].rest_ids for index in wanted):
            raise ValueError("a prompt has no tokens before or behind its knowledge")
        passes = self._kept_passes if self._keeps_texts else self._reread_passes
        for part, hidden in passes(samples, wanted):
            for index, hidden_TE in zip(part, hidden, strict=True):
                found[index] = hidden_TE
        return found

    @torch.no_grad()
    def reread(self, samples: Sequence[Sample], *, packed: bool = False) -> list[Tensor]:
        """Compute the same from one pass over the whole prompts and responses, without caches."""
        responses = [sample.response_ids for sample in samples]
        prompts = [sample.teacher_prompt_ids for sample in samples]
        batch = lay_out(prompts, responses, self.model.device, packed=packed)
        return list(torch.split(response_hidden(self.model, batch), [len(response) for response in responses]))

    def _reread_passes(
        self, samples: Sequence[Sample], wanted: Sequence[int]
    ) -> Iterator[tuple[list[int], list[Tensor]]]:
        lengths = [len(samples[index].teacher_prompt_ids) + len(samples[index].response_ids) for index in wanted]
        for group in length_groups(lengths, self.pass_tokens):
            part = [wanted[position] for position in group]
            yield part, self.reread([samples[index] for index in part])

    def _kept_passes(
        self, samples: Sequence[Sample], wanted: Sequence[int]
    ) -> Iterator[tuple[list[int], list[Tensor]]]:
        by_text: dict[Text, list[int]] = {}
        for index in wanted:
            by_text.setdefault(samples[index].knowledge_ids, []).append(index)
        for text in sorted(by_text, key=self.caches.distance):
            cache = self.caches.get(text)
            for part in buckets(by_text[text], lambda index: samples[index].tokens_behind, self.pass_tokens):
                yield part, self._read_behind(cache, len(text), [samples[index] for index in part])
        self.caches.make_room()

    def _read_text(self, text: Text) -> TextCache:
        cache = DynamicCache(config=self.model.config)
        tokens_1P = torch.tensor([text], dtype=torch.long, device=self.model.device)
        self.model.base_model(input_ids=tokens_1P, past_key_values=cache, use_cache=True)
        return TextCache(tuple((layer.keys, layer.values) for layer in cache.layers))

    def _read_behind(self, cache: TextCache, kept: int, samples: Sequence[Sample]) -> list[Tensor]:
        """Read all samples in one row after the `kept` tokens.

        Each attends to those and to itself, at positions after them.
        """
        device = self.model.device
        pieces = [[*sample.rest_ids, *sample.response_ids] for sample in samples]
        tokens_1Q = torch.tensor([[token for piece in pieces for token in piece]], dtype=torch.long, device=device)
        positions_1Q = torch.cat([torch.arange(kept, kept + len(piece), device=device) for piece in pieces])[None]
        owner_Q = torch.repeat_interleave(torch.tensor([len(piece) for piece in pieces], device=device))
        own_QQ = (owner_Q[:, None] == owner_Q).tril()
        # Added to the scores, because every attention accepts that; torch's own would convert booleans in each layer.
        mask_QK = torch.zeros(len(owner_Q), kept + len(owner_Q), dtype=self.model.dtype, device=device)
        mask_QK[:, kept:].masked_fill_(~own_QQ, torch.finfo(self.model.dtype).min)
        output = self.model.base_model(
            input_ids=tokens_1Q,
            attention_mask=mask_QK[None, None],
            position_ids=positions_1Q,
            past_key_values=cache.as_past(),
            use_cache=True,
        )
        hidden_QE: Tensor = output.last_hidden_state[0]
        ends = accumulate(len(piece) for piece in pieces)
        return [
            hidden_QE[end - len(sample.response_ids) - 1 : end - 1].clone()  # a view would keep the whole row
            for end, sample in zip(ends, samples, strict=True)
        ]
