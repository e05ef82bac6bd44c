"""From the samples of one optimisation step to micro-batches. Training workers; imports no torch.

Every rank calls these functions with the same samples of the whole global batch and gets its own share, so the
weights are global and nothing has to be exchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LossMean = Literal["response", "token"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A response of the student, with the prompt it was written for and the same prompt with knowledge in it."""

    id: str
    student_prompt_ids: Sequence[int]
    teacher_prompt_ids: Sequence[int]
    response_ids: Sequence[int]

    @property
    def cost(self) -> int:
        """Tokens that the two models read for this sample."""
        return len(self.student_prompt_ids) + len(self.teacher_prompt_ids) + 2 * len(self.response_ids)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples of one forward pass of one rank; `weights[n]` is the weight of each response token of sample n."""

    samples: tuple[Sample, ...]
    weights: tuple[float, ...]


def token_weights(samples: Sequence[Sample], loss_mean: LossMean) -> list[float]:
    """The weight of each response token, one number per sample, so that the step's loss is a plain weighted sum.

    "response": mean over the tokens of a response, then over all samples, a sample without a token counting as 0.
    "token": mean over all response tokens.
    """
    if loss_mean == "token":
        total = sum(len(sample.response_ids) for sample in samples)
        return [1.0 / total if sample.response_ids else 0.0 for sample in samples]
    return [1.0 / (len(s.response_ids) * len(samples)) if s.response_ids else 0.0 for s in samples]


def micro_batches(
    samples: Sequence[Sample], rank: int, world_size: int, micro_batch: int, *, loss_mean: LossMean = "response"
) -> list[MicroBatch]:
    """This rank's share of the global batch in micro-batches of at most `micro_batch` samples of similar length.

    Over all ranks every sample occurs once with its weight. Every rank gets the same number of micro-batches,
    because each forward and backward pass is a collective under ZeRO: shares that come out one sample short are
    filled with the cheapest sample at weight zero. Longest first, so that memory runs out at once or never.
    """
    weights = token_weights(samples, loss_mean)
    order = sorted(range(len(samples)), key=lambda index: (-samples[index].cost, index))
    share = [(samples[index], weights[index]) for index in order[rank::world_size]]
    share_size = -(-len(samples) // world_size)
    if len(share) < share_size:
        share.append((samples[order[-1]], 0.0))
    batches = [share[start : start + micro_batch] for start in range(0, share_size, micro_batch)]
    return [MicroBatch(tuple(s for s, _ in batch), tuple(w for _, w in batch)) for batch in batches]
