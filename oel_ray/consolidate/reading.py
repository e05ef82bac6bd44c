"""How a model reads prompts with their responses: padded, or as one row. Training workers (Ray Train group); needs no
Ray itself.

Shape suffixes: B sequences, S positions, T response tokens of the batch, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from oel_ray.errors import UserError

_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class LaidOut:
    """Prompts with their responses, as a model takes them.

    Padded on the right there is a mask; one behind the other in a single row there are positions, which start anew
    with each. `rows_T` are the rows of the flattened [B * S] positions that predict the response tokens, sample by
    sample: in each from the last one of the prompt to the last but one of the response.
    """

    tokens_BS: Tensor
    mask_BS: Tensor | None
    positions_BS: Tensor | None
    rows_T: Tensor


LayOut = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]], torch.device | str], LaidOut]
"""`pad_tokens` or `pack_tokens`."""


def pad_tokens(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device | str
) -> LaidOut:
    """The padding token is 0; it is masked, and behind everything that is read.

    Raises:
        ValueError: a prompt is empty, so that nothing predicts the first response token.
    """
    texts = _texts(prompts, responses)
    width = max(map(len, texts))
    mask_BS = torch.arange(width) < torch.tensor([len(text) for text in texts]).unsqueeze(1)
    return LaidOut(
        torch.tensor([text + [0] * (width - len(text)) for text in texts], dtype=torch.long).to(device),
        mask_BS.long().to(device),
        None,
        _rows(range(0, width * len(texts), width), prompts, responses).to(device),
    )


def pack_tokens(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device | str
) -> LaidOut:
    """A model that `can_pack` keeps the samples apart by their positions.

    Raises:
        ValueError: a prompt is empty, so that nothing predicts the first response token.
    """
    texts = _texts(prompts, responses)
    lengths = [len(text) for text in texts]
    return LaidOut(
        torch.tensor([[token for text in texts for token in text]], dtype=torch.long).to(device),
        None,
        torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(device),
        _rows(accumulate(lengths[:-1], initial=0), prompts, responses).to(device),
    )


def _texts(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[int]]:
    if not all(prompts):
        raise ValueError("a prompt has no tokens")
    return [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]


def _rows(starts: Iterable[int], prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
    rows = [
        start + len(prompt) - 1 + offset
        for start, prompt, response in zip(starts, prompts, responses, strict=True)
        for offset in range(len(response))
    ]
    return torch.tensor(rows, dtype=torch.long)


def response_hidden(model: Any, texts: LaidOut) -> Tensor:
    """The final hidden states (hidden_TD) that the model's head would read at the response positions."""
    # some models know no such argument
    told = {} if texts.positions_BS is None else {"position_ids": texts.positions_BS}
    output = model.base_model(input_ids=texts.tokens_BS, attention_mask=texts.mask_BS, use_cache=False, **told)
    hidden_BSD: Tensor = output.last_hidden_state
    return hidden_BSD.flatten(0, 1).index_select(0, texts.rows_T)


def has_fixed_rotations(model: Any) -> bool:
    """Whether the model is told its positions, and turns keys by the same angle however long the prompt is."""
    config = model.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = [rope for rope in ropes.values() if isinstance(rope, dict)] or [ropes]  # one for every kind of layer
    fixed = all(kind.get("rope_type") in _FIXED_ROTATIONS for kind in kinds)
    return fixed and not getattr(config, "alibi", False)


def can_pack(model: Any) -> bool:
    """Whether the model reads samples that stand in one row as it reads each alone.

    It takes positions that are told, and layers that look back at a sample's own tokens: all of them or a window, no
    chunks that are counted from the start of the row, and no state that is carried on from token to token.
    """
    config = model.config.get_text_config()
    layers = DynamicCache(config=config).layers
    return (
        has_fixed_rotations(model)
        and not model._is_stateful
        and not getattr(config, "attention_chunk_size", None)
        and len(layers) == config.num_hidden_layers
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    )


def layout_for(model: Any, packing: Literal["auto", "always", "never"]) -> LayOut:
    """How the student's samples are laid out (`consolidate.packing`).

    Raises:
        UserError: they are to be packed in any case, and the model cannot read them so.
    """
    if packing == "always" and not can_pack(model):
        raise UserError(
            f"consolidate.packing=always: {type(model).__name__} cannot keep samples apart that stand in one row: set "
            "consolidate.packing=auto"
        )
    flash = "flash" in model.config._attn_implementation
    packed = packing == "always" or (packing == "auto" and flash and can_pack(model))
    return pack_tokens if packed else pad_tokens


@contextmanager
def attention_of(model: Any, implementation: str) -> Iterator[None]:
    """The model reads with this implementation of attention meanwhile."""
    own = model.config._attn_implementation
    if own != implementation:
        model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        if own != implementation:
            model.set_attn_implementation(own)
