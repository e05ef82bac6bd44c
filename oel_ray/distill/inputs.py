"""How a model reads prompts with their responses: padded, or as one row. Training workers (Ray Train group); needs no
Ray itself.

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
    """Prompts with their responses, as a model takes them.

    Padded on the right there is a mask; one behind the other in a single row there are positions, which start anew
    with each. `rows_T` are the rows of the flattened [B * S] positions that predict the response tokens, sample by
    sample: in each from the last one of the prompt to the last but one of the response.
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
    """Padded with token 0, which is masked and behind all that is read; or `packed`, for a model that `can_pack`.

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
    """The final hidden states (hidden_TD) that the model's head would read at the response positions."""
    # some models know no such argument
    told = {} if texts.positions_BS is None else {"position_ids": texts.positions_BS}
    output = model.base_model(input_ids=texts.tokens_BS, attention_mask=texts.mask_BS, use_cache=False, **told)
    hidden_BSD: Tensor = output.last_hidden_state
    return hidden_BSD.flatten(0, 1).index_select(0, texts.rows_T)


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
