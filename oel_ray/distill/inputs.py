"""Lay out prompts with their responses for a model, padded or packed into one row. Training workers (Ray Train group);
needs no Ray itself.

Shape suffixes: B sequences, S positions, T response tokens of the batch, D width.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, slots=True)
class LaidOut:
    """Prompts with their responses, as inputs of a model.

    Padded samples (on the right) have a mask. Samples packed into one row have positions, which start at 0 in each
    sample. `rows_T` are the rows of the flattened [B * S] positions that predict the response tokens, sample by sample.
    They run from the last token of the prompt to the last but one of the response.
    """

    tokens_BS: Tensor
    mask_BS: Tensor | None
    positions_BS: Tensor | None
    rows_T: Tensor


def lay_out(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    device: torch.device | str,
    *,
    packed: bool = False,
) -> LaidOut:
    """Pad the samples on the right with token 0, which is masked, or pack them into one row (see `can_pack`).

    Raises:
        ValueError: a prompt is empty, so that nothing predicts the first response token.
    """
    if not all(prompts):
        raise ValueError("a prompt has no tokens")
    texts = [torch.tensor([*prompt, *response]) for prompt, response in zip(prompts, responses, strict=True)]
    mask_BS = positions_BS = None
    starts: Iterable[int]
    if packed:
        tokens_BS = torch.cat(texts).unsqueeze(0)
        positions_BS = torch.cat([torch.arange(len(text)) for text in texts]).unsqueeze(0).to(device)
        starts = accumulate(map(len, texts[:-1]), initial=0)
    else:
        tokens_BS = pad_sequence(texts, batch_first=True)
        mask_BS = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True).to(device)
        starts = range(0, tokens_BS.numel(), tokens_BS.shape[1])
    rows = [
        start + len(prompt) - 1 + offset
        for start, prompt, response in zip(starts, prompts, responses, strict=True)
        for offset in range(len(response))
    ]
    return LaidOut(tokens_BS.to(device), mask_BS, positions_BS, torch.tensor(rows, dtype=torch.long, device=device))


def response_hidden(model: Any, texts: LaidOut) -> Tensor:
    """Compute the final hidden states (hidden_TD) that the model's head would read at the response positions."""
    # some models take no such argument
    told = {} if texts.positions_BS is None else {"position_ids": texts.positions_BS}
    output = model.base_model(input_ids=texts.tokens_BS, attention_mask=texts.mask_BS, use_cache=False, **told)
    hidden_BSD: Tensor = output.last_hidden_state
    return hidden_BSD.flatten(0, 1).index_select(0, texts.rows_T)


@contextmanager
def attention_of(model: Any, implementation: str) -> Iterator[None]:
    """Have the model use this attention implementation inside the block."""
    own = model.config._attn_implementation
    if own != implementation:
        model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        if own != implementation:
            model.set_attn_implementation(own)
