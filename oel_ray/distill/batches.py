"""From the samples of one optimisation step to a rank's micro-batches. Training workers; imports no torch.

Every rank calls these functions with the same samples of the whole global batch and gets its own share, so the
weights are global and nothing has to be exchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

LossMean = Literal["response", "token"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A response of the student, the prompt it was written for, and what the teacher's prompt begins with instead.

    `knowledge_ids` are the ids of the head and a knowledge text, the plain head if that is empty: one object, shared
    by the samples of the text. The first `head` of the student's ids are the plain head; both read what follows.
    """

    id: str
    student_prompt_ids: Sequence[int]
    head: int
    knowledge_ids: tuple[int, ...]
    response_ids: Sequence[int]

    @property
    def rest_ids(self) -> Sequence[int]:
        """The teacher's prompt behind the knowledge."""
        return self.student_prompt_ids[self.head :]

    @property
    def teacher_prompt_ids(self) -> list[int]:
        return [*self.knowledge_ids, *self.rest_ids]

    @property
    def has_knowledge(self) -> bool:
        """Whether the teacher's prompt is another than the student's."""
        return self.knowledge_ids != tuple(self.student_prompt_ids[: self.head])

    @property
    def student_tokens(self) -> int:
        return len(self.student_prompt_ids) + len(self.response_ids)

    @property
    def tokens_behind(self) -> int:
        """Tokens that the teacher reads behind the knowledge."""
        return len(self.rest_ids) + len(self.response_ids)

    @property
    def cost(self) -> int:
        """Tokens that the two models read for this sample, once the teacher knows the knowledge text."""
        return self.student_tokens + self.tokens_behind


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
    samples: Sequence[Sample],
    rank: int,
    world_size: int,
    max_tokens: int,
    *,
    loss_mean: LossMean = "response",
    packed: bool = False,
) -> list[MicroBatch]:
    """This rank's share of the global batch, in micro-batches of at most `max_tokens`, longest samples first.

    Padding counts, unless they are to be `packed`.

    A rank has the samples of few knowledge texts, in every step much the same ones, as its teacher keeps them. Over
    all ranks every sample occurs once with its weight. Every rank gets the same number of micro-batches, because each
    forward and backward pass is a collective under ZeRO: what is missing is filled with the shortest prompt, without
    a response and at weight zero.
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
    """The shortest prompt without a response, for a rank that has to take part and has nothing to add."""
    shortest = min(samples, key=lambda sample: len(sample.student_prompt_ids))
    return MicroBatch((replace(shortest, response_ids=()),), (0.0,))


def _shares(samples: Sequence[Sample], world_size: int) -> list[list[int]]:
    """Every rank's samples, as indices: all of them on a line, ordered by text, cut into pieces of near-equal cost."""
    line = sorted(range(len(samples)), key=lambda index: samples[index].knowledge_ids)
    total = sum(sample.cost for sample in samples)
    shares: list[list[int]] = [[] for _ in range(world_size)]
    passed = 0
    for index in line:
        cost = samples[index].cost
        shares[(2 * passed + cost) * world_size // (2 * total)].append(index)  # where the sample's middle lies
        passed += cost
    return shares


def length_groups(lengths: Sequence[int], max_tokens: int, *, packed: bool = False) -> list[list[int]]:
    """Indices of neighbours in length, the longest first: so that memory runs out at once or never.

    A group, padded to its longest unless it is `packed`, is at most `max_tokens`, or a single one that is longer.
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
    """Rows, and tokens of each, that samples of these lengths make in one pass."""
    return (1, sum(lengths)) if packed else (len(lengths), max(lengths))
