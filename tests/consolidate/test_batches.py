import pytest
from hypothesis import given
from hypothesis import strategies as st

from oel_ray.consolidate.batches import Sample, micro_batches, token_weights


def samples_of(lengths: list[int]) -> list[Sample]:
    return [Sample(str(i), [1] * (1 + i % 3), [1] * (4 + i % 5), [2] * n) for i, n in enumerate(lengths)]


lengths = st.lists(st.integers(0, 20), min_size=1, max_size=40)


@given(lengths, st.integers(1, 5), st.integers(1, 6), st.sampled_from(["response", "token"]))
def test_every_sample_once_with_its_weight_and_equal_counts_on_all_ranks(
    lengths: list[int], world_size: int, micro_batch: int, loss_mean: str
) -> None:
    samples = samples_of([*lengths, 3])  # at least one response with tokens, so that a weight tells a filler
    shares = [
        micro_batches(samples, rank, world_size, micro_batch, loss_mean=loss_mean)  # type: ignore[arg-type]
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    entries = [pair for share in shares for b in share for pair in zip(b.samples, b.weights, strict=True)]
    weights = token_weights(samples, loss_mean)  # type: ignore[arg-type]
    expected = sorted((s.id, w) for s, w in zip(samples, weights, strict=True) if w > 0)
    assert sorted((s.id, w) for s, w in entries if w > 0) == expected
    assert {s.id for s, _ in entries} == {s.id for s in samples}
    assert all(0 < len(b.samples) <= micro_batch for share in shares for b in share)
    assert len(entries) - len(samples) < world_size
    assert shares[0] == micro_batches(samples, 0, world_size, micro_batch, loss_mean=loss_mean)  # type: ignore[arg-type]


def test_neighbours_in_length_share_a_micro_batch_and_the_longest_come_first() -> None:
    batches = micro_batches(samples_of([1, 18, 2, 20, 3, 19]), 0, 1, 3)
    assert [[len(s.response_ids) for s in b.samples] for b in batches] == [[20, 19, 18], [3, 2, 1]]


def test_weights_of_both_means() -> None:
    samples = samples_of([2, 8, 0])
    assert token_weights(samples, "response") == [1 / 6, 1 / 24, 0.0]
    assert token_weights(samples, "token") == [0.1, 0.1, 0.0]
    assert token_weights(samples_of([0]), "token") == [0.0]


@given(lengths)
def test_weights_add_up_to_one(lengths: list[int]) -> None:
    samples = samples_of([n + 1 for n in lengths])
    for loss_mean in ("response", "token"):
        weights = token_weights(samples, loss_mean)
        total = sum(w * len(s.response_ids) for s, w in zip(samples, weights, strict=True))
        assert total == pytest.approx(1.0)
