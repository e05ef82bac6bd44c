"""Divide the samples of one optimizer step into each rank's micro-batches. Training workers; imports no torch.

Every rank calls these functions with the same samples, those of the global batch, and gets its own share. So the
weights are global and the ranks need not communicate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

LossMean = Literal["response", "token"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A response, its student prompt, and the ids that replace the head of that prompt for the teacher.

    `knowledge_ids` are the ids of the head and a knowledge text, or of the plain head if the text is empty. Samples of
    one text share the object. The first `head` ids of the student's prompt are the plain head. Student and teacher read
    the same ids after it.
    """

    id: str
    student_prompt_ids: Sequence[int]
    head: int
    knowledge_ids: tuple[int, ...]
    response_ids: Sequence[int]

    @property
    def rest_ids(self) -> Sequence[int]:
        """The part of the prompt after the head, the same for student and teacher."""
        return self.student_prompt_ids[self.head :]

    @property
    def teacher_prompt_ids(self) -> list[int]:
        return [*self.knowledge_ids, *self.rest_ids]

    @property
    def has_knowledge(self) -> bool:
        """Whether the teacher's prompt differs from the student's."""
        return self.knowledge_ids != tuple(self.student_prompt_ids[: self.head])

    @property
    def student_tokens(self) -> int:
        return len(self.student_prompt_ids) + len(self.response_ids)

    @property
    def tokens_behind(self) -> int:
        """Tokens that the teacher reads after the knowledge."""
        return len(self.rest_ids) + len(self.response_ids)

    @property
    def cost(self) -> int:
        """Tokens that the two models read for this sample if the teacher has cached the knowledge text."""
        return self.student_tokens + self.tokens_behind


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The samples of one forward pass of one rank; `weights[n]` is the weight of each response token of sample n."""

    samples: tuple[Sample, ...]
    weights: tuple[float, ...]


def token_weights(samples: Sequence[Sample], loss_mean: LossMean) -> list[float]:
    """Compute the weight of a response token, one number per sample. The step's loss is then a plain weighted sum.

    "response": mean over the tokens of a response, then over all samples, a sample without a token counting as 0.
    "token": mean over all response tokens.
    """
    if loss_mean == "token":
        total = sum(len(sample.response_ids) for sample in samples)
        return [1.0 / total if sample.response_ids else 0.0 for sample in samples]
    return [1.0 / (len(s.response_ids) * len(samples)) if s.response_ids else 0.0 for s in samples]


def micro_batches(
    samples: Sequence[Sample],
    rank: int,
    world_size: int,
    max_tokens: int,
    *,
    loss_mean: LossMean = "response",
    packed: bool = False,
) -> list[MicroBatch]:
    """Build this rank's share of the global batch: micro-batches of at most `max_tokens`, longest samples first.

    Padding counts towards `max_tokens`, unless the samples are `packed`.

    A rank gets the samples of few knowledge texts, mostly the same ones in every step, because its teacher caches them.
    Over all ranks every sample occurs once with its weight. Every rank gets the same number of micro-batches, because
    each forward and backward pass is a collective under ZeRO. Ranks with fewer get fillers: the shortest prompt,
    without a response and at weight zero.
    """
    weights = token_weights(samples, loss_mean)
    groups_of_ranks = []
    for share in _shares(samples, world_size):
        groups = length_groups([samples[index].student_tokens for index in share], max_tokens, packed=packed)
        groups_of_ranks.append([[share[position] for position in group] for group in groups])
    mine = groups_of_ranks[rank]
    batches = [MicroBatch(tuple(samples[i] for i in group), tuple(weights[i] for i in group)) for group in mine]
    return batches + [filler(samples)] * (max(map(len, groups_of_ranks)) - len(batches))


def filler(samples: Sequence[Sample]) -> MicroBatch:
    """Make a micro-batch of the shortest prompt without a response, for a rank that only joins the collectives."""
    shortest = min(samples, key=lambda sample: len(sample.student_prompt_ids))
    return MicroBatch((replace(shortest, response_ids=()),), (0.0,))


def _shares(samples: Sequence[Sample], world_size: int) -> list[list[int]]:
    """Cut all samples, ordered by knowledge text, into one share per rank of near-equal cost. Shares hold indices."""
    line = sorted(range(len(samples)), key=lambda index: samples[index].knowledge_ids)
    total = sum(sample.cost for sample in samples)
    shares: list[list[int]] = [[] for _ in range(world_size)]
    passed = 0
    for index in line:
        cost = samples[index].cost
        shares[(2 * passed + cost) * world_size // (2 * total)].append(index)  # the share with the sample's middle
        passed += cost
    return shares


def length_groups(lengths: Sequence[int], max_tokens: int, *, packed: bool = False) -> list[list[int]]:
    """Group samples of similar length, as indices. The longest come first, because memory then runs out at once or
    never.

    A group has at most `max_tokens`, padded to its longest unless it is `packed`. A longer sample is a group of its
    own.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        group = [*(groups[-1] if groups else []), index]
        rows, width = pass_shape([lengths[member] for member in group], packed=packed)
        if groups and rows * width <= max_tokens:
            groups[-1] = group
        else:
            groups.append([index])
    return groups


def pass_shape(lengths: Sequence[int], *, packed: bool) -> tuple[int, int]:
    """Compute the shape of one pass over samples of these lengths: rows, and tokens per row."""
    return (1, sum(lengths)) if packed else (len(lengths), max(lengths))
