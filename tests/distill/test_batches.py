from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oel_ray.distill.batches import LossMean, MicroBatch, Sample, length_groups, micro_batches, token_weights

HEAD = 2


def sample(number: int, response: int, text: int = 0, prompt: int = 1) -> Sample:
    return Sample(str(number), [1] * (HEAD + prompt), HEAD, (1, 1, *[text] * text), [2] * response)


def samples_of(lengths: list[int]) -> list[Sample]:
    return [sample(number, length, text=number % 4, prompt=1 + number % 5) for number, length in enumerate(lengths)]


def shares_of(
    samples: list[Sample], ranks: int, budget: int, mean: LossMean = "response", *, packed: bool = False
) -> list[list[MicroBatch]]:
    return [micro_batches(samples, rank, ranks, budget, loss_mean=mean, packed=packed) for rank in range(ranks)]


def texts(share: list[MicroBatch]) -> set[tuple[int, ...]]:
    return {s.knowledge_ids for batch in share for s in batch.samples if s.response_ids}


lengths = st.lists(st.integers(0, 20), min_size=1, max_size=40)
means = st.sampled_from(["response", "token"])


@given(lengths, st.integers(1, 5), st.integers(1, 80), means)
def test_every_sample_once_with_its_weight_and_equal_counts_on_all_ranks(
    lengths: list[int], ranks: int, budget: int, mean: LossMean
) -> None:
    samples = samples_of([n + 1 for n in lengths])  # with a response each, so that a weight tells a filler
    shares = shares_of(samples, ranks, budget, mean)
    assert len({len(share) for share in shares}) == 1
    entries = [pair for share in shares for batch in share for pair in zip(batch.samples, batch.weights, strict=True)]
    weights = token_weights(samples, mean)
    real = sorted((s.id, w) for s, w in entries if w > 0)
    assert real == sorted((s.id, w) for s, w in zip(samples, weights, strict=True))
    assert all(not s.response_ids for s, w in entries if w == 0), "a filler has nothing to learn from"
    assert sum(len(s.response_ids) * w for s, w in entries) == pytest.approx(1.0)
    assert shares == shares_of(samples, ranks, budget, mean)


@given(lengths, st.integers(1, 5))
def test_responses_without_a_token_are_dealt_out_too(lengths: list[int], ranks: int) -> None:
    samples = samples_of(lengths)
    assert {s.id for share in shares_of(samples, ranks, 30) for b in share for s in b.samples} == {
        s.id for s in samples
    }


@given(lengths, st.integers(1, 5), st.integers(1, 80))
def test_a_micro_batch_with_its_padding_keeps_the_budget_unless_it_is_one_sample(
    lengths: list[int], ranks: int, budget: int
) -> None:
    for share in shares_of(samples_of(lengths), ranks, budget):
        for batch in share:
            width = max(s.student_tokens for s in batch.samples)
            assert width * len(batch.samples) <= budget or len(batch.samples) == 1


@given(lengths, st.integers(1, 5), st.integers(1, 80))
def test_a_packed_micro_batch_counts_its_own_tokens_alone(lengths: list[int], ranks: int, budget: int) -> None:
    samples = samples_of([n + 1 for n in lengths])
    packed, padded = (shares_of(samples, ranks, budget, packed=packed) for packed in (True, False))
    for share in packed:
        for batch in share:
            assert sum(s.student_tokens for s in batch.samples) <= budget or len(batch.samples) == 1
    assert len(packed[0]) <= len(padded[0])
    ids = [
        sorted(s.id for share in shares for b in share for s, w in zip(b.samples, b.weights, strict=True) if w)
        for shares in (packed, padded)
    ]
    assert ids[0] == ids[1] == sorted(s.id for s in samples)


@given(st.permutations(range(40)), st.integers(1, 10), st.integers(1, 6))
def test_a_rank_has_few_texts_and_its_share_of_the_tokens(order: list[int], count: int, ranks: int) -> None:
    samples = [sample(number, 5, text=number % count) for number in order if number < 40 // count * count]
    shares = shares_of(samples, ranks, 30)
    assert all(len(texts(share)) <= ceil(count / ranks) + 1 for share in shares)
    costs = [sum(s.cost for batch in share for s in batch.samples if s.response_ids) for share in shares]
    assert max(costs) - min(costs) <= 2 * samples[0].cost


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 6))
def test_no_rank_has_more_than_its_share_and_a_sample(lengths: list[int], ranks: int) -> None:
    samples = samples_of(lengths)
    fair = sum(s.cost for s in samples) / ranks
    for share in shares_of(samples, ranks, 30):
        cost = sum(s.cost for batch in share for s in batch.samples if s.response_ids)
        assert cost <= fair + max(s.cost for s in samples)


def test_a_rank_keeps_its_texts_from_step_to_step() -> None:
    steps = [[sample(n, 5, text=(n * factor) % 4) for n in range(40)] for factor in (1, 3)]
    first, second = (shares_of(samples, 2, 60) for samples in steps)
    assert [texts(share) for share in first] == [texts(share) for share in second]
    assert not texts(first[0]) & texts(first[1])


def test_a_filler_is_the_shortest_prompt() -> None:
    shares = shares_of([sample(0, 9, prompt=7), sample(1, 2, prompt=3)], 3, 100)
    fillers = [batch for share in shares for batch in share if batch.weights == (0.0,)]
    assert [batch.samples[0].student_prompt_ids for batch in fillers] == [[1] * (HEAD + 3)]


def test_neighbours_in_length_are_together_and_the_longest_come_first() -> None:
    assert length_groups([1, 18, 2, 20, 3, 19], 60) == [[3, 5, 1], [4, 2, 0]]
    assert length_groups([1, 18, 2, 20, 3, 19], 60, packed=True) == [[3, 5, 1, 4], [2, 0]]
    assert length_groups([5, 70, 5], 60) == [[1], [0, 2]]
    assert length_groups([], 60) == []


def test_token_weights_average_over_responses_or_over_tokens() -> None:
    samples = samples_of([2, 8, 0])
    assert token_weights(samples, "response") == [1 / 6, 1 / 24, 0.0]
    assert token_weights(samples, "token") == [0.1, 0.1, 0.0]
    assert token_weights(samples_of([0]), "token") == [0.0]
