"""How a model reads prompts with their responses, padded. Training workers (Ray Train group); needs no Ray itself.

Shape suffixes: B sequences, S positions, T response tokens of the batch, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PaddedTokens:
    """Prompts with their responses, padded on the right.

    `rows_T` are the rows of the flattened [B * S] positions that predict the response tokens, sample by sample:
    positions prompt_length - 1 up to prompt_length + response_length - 2.
    """

    tokens_BS: Tensor
    mask_BS: Tensor
    rows_T: Tensor


def pad_tokens(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device | str
) -> PaddedTokens:
    """The padding token is 0; it is masked, and behind everything that is read.

    Raises:
        ValueError: a prompt is empty, so that nothing predicts the first response token.
    """
    if not all(prompts):
        raise ValueError("a prompt has no tokens")
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    width = max(lengths)
    tokens = [[*p, *r, *[0] * (width - n)] for p, r, n in zip(prompts, responses, lengths, strict=True)]
    rows = [
        index * width + len(prompt) - 1 + offset
        for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        for offset in range(len(response))
    ]
    mask_BS = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    return PaddedTokens(
        torch.tensor(tokens, dtype=torch.long).to(device),
        mask_BS.long().to(device),
        torch.tensor(rows, dtype=torch.long).to(device),
    )


def response_hidden(model: Any, tokens_BS: Tensor, mask_BS: Tensor, rows_T: Tensor) -> Tensor:
    """The final hidden states (hidden_TD) that the model's head would read at the response positions."""
    output = model.base_model(input_ids=tokens_BS, attention_mask=mask_BS, use_cache=False)
    hidden_BSD: Tensor = output.last_hidden_state
    return hidden_BSD.flatten(0, 1).index_select(0, rows_T)
