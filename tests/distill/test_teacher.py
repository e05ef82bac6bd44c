"""The kept teacher against one that reads every prompt alone and anew."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from oel_ray.distill.batches import Sample
from oel_ray.distill.caches import CacheCounts, TextCache, TextCaches
from oel_ray.distill.module import logit_soft_cap
from oel_ray.distill.teacher import Teacher
from oel_ray.models.capabilities import can_keep_texts
from tests.support.naive_losses import soft_capped
from tests.support.tiny_models import tiny_model as family_model
from tests.support.tiny_training import HEAD, KNOWLEDGE, VOCABULARY, tiny_model, tiny_samples

GIB = 2**30
SAMPLES = tiny_samples(11, seed=0)


def model_of(family: str, **changes: Any) -> Any:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return family_model(family, vocab_size=VOCABULARY, tied=True, seed=0, **ids, **changes)


def teacher_of(model: Any, *, device: float = GIB, host: float = GIB, pass_tokens: int = 40) -> Teacher:
    return Teacher(model, device_bytes=device, host_bytes=host, pass_tokens=pass_tokens)


@torch.no_grad()
def log_probabilities(model: Any, samples: list[Sample]) -> list[Tensor]:
    """What the model itself makes of every sample alone."""
    found = []
    for sample in samples:
        prompt = sample.teacher_prompt_ids
        logits_SV = model(torch.tensor([[*prompt, *sample.response_ids]])).logits[0]
        found.append(logits_SV[len(prompt) - 1 : -1].float().log_softmax(-1))
    return found


@torch.no_grad()
def of_hidden(model: Any, hidden: list[Tensor]) -> list[Tensor]:
    head, soft_cap = model.get_output_embeddings(), logit_soft_cap(model)
    return [soft_capped(head(hidden_TE), soft_cap).float().log_softmax(-1) for hidden_TE in hidden]


def furthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    return max((x - y).abs().max().item() for x, y in zip(ours, theirs, strict=True) if x.numel())


def text_bytes(model: Any, text: tuple[int, ...]) -> int:
    config = model.config
    return len(text) * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("pass_tokens", [1, 25, 1000])
def test_the_teacher_with_kept_texts_equals_reading_every_prompt_alone(
    kind: str, attention: str, pass_tokens: int
) -> None:
    model = tiny_model(kind, seed=1)
    model.set_attn_implementation(attention)
    teacher = teacher_of(model, pass_tokens=pass_tokens)
    expected = log_probabilities(model, SAMPLES)
    for _ in range(2):  # with texts that are new, and with kept ones
        assert furthest(of_hidden(model, teacher.hidden(SAMPLES)), expected) < 1e-4
    assert teacher.caches.counts == CacheCounts(hits=4, builds=4)


def test_in_bfloat16_kept_texts_are_as_near_to_float32_as_reencoding() -> None:
    exact = log_probabilities(tiny_model("untied", seed=1), SAMPLES)
    model = tiny_model("untied", seed=1).bfloat16()
    ours = furthest(of_hidden(model, teacher_of(model).hidden(SAMPLES)), exact)
    anew = furthest(log_probabilities(model, SAMPLES), exact)
    assert ours < 1.5 * anew


@pytest.mark.parametrize("family", ["qwen3", "llama", "smollm3", "gemma"])
def test_families_with_full_attention_keep_their_texts(family: str) -> None:
    model = model_of(family)
    teacher = teacher_of(model)
    assert furthest(of_hidden(model, teacher.hidden(SAMPLES)), log_probabilities(model, SAMPLES)) < 1e-4
    assert teacher.caches.counts.builds == len(KNOWLEDGE)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_families_with_sliding_windows_keep_no_texts_and_reencode_every_prompt(family: str) -> None:
    model = model_of(family)
    model.set_attn_implementation("eager")
    rng = random.Random(0)
    long = tuple(rng.choices(range(5, VOCABULARY), k=70))  # longer than the window
    samples = [Sample(s.id, s.student_prompt_ids, s.head, HEAD + long, s.response_ids) for s in SAMPLES]
    teacher = teacher_of(model, pass_tokens=200)
    assert furthest(of_hidden(model, teacher.hidden(samples)), log_probabilities(model, samples)) < 1e-4
    assert teacher.caches.counts == CacheCounts()


@pytest.mark.parametrize(
    ("changes", "attention", "can"),
    [
        ({}, "sdpa", True),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "sdpa", True),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "sdpa", False),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sdpa", False),
        ({}, "flex_attention", False),
    ],
)
def test_the_configuration_says_whether_texts_can_be_kept(changes: dict[str, Any], attention: str, can: bool) -> None:
    model = model_of("qwen3", **changes)
    model.config._attn_implementation = attention
    assert can_keep_texts(model) == can


def test_teacher_outputs_depend_on_no_other_sample_and_kept_texts_stay_unchanged() -> None:
    model = tiny_model("tied", seed=1)
    teacher = teacher_of(model, pass_tokens=1000)
    together = teacher.hidden(SAMPLES)
    backwards = teacher.hidden(SAMPLES[::-1])[::-1]
    alone = [teacher.hidden([sample])[0] for sample in SAMPLES]
    assert furthest(together, backwards) < 1e-4
    assert furthest(together, alone) < 1e-4
    again = teacher.hidden(SAMPLES)  # the same rows: equal to the bit if what lies before them is
    assert all(torch.equal(x, y) for x, y in zip(together, again, strict=True))


def test_texts_without_room_on_the_device_are_kept_on_the_host_or_reencoded() -> None:
    model = tiny_model("tied", seed=1)
    expected = log_probabilities(model, SAMPLES)
    sizes = sorted(text_bytes(model, text) for text in KNOWLEDGE)
    largest, total = sizes[-1], sum(sizes)
    for device, host, counts in [
        (total, 0, CacheCounts(hits=8, builds=4)),
        (total - 1, total, CacheCounts(hits=6, loads=2, builds=4, offloads=2)),
        (0, total, CacheCounts(loads=8, builds=4, offloads=4)),
        (0, largest, CacheCounts(loads=2, builds=10, offloads=10)),
        (0, 0, CacheCounts(builds=12)),
    ]:
        teacher = teacher_of(model, device=device, host=host)
        for _ in range(3):
            assert furthest(of_hidden(model, teacher.hidden(SAMPLES)), expected) < 1e-4
        assert teacher.caches.counts == counts, (device, host)


def text_cache(length: int) -> TextCache:
    return TextCache(((torch.zeros(1, 1, length, 1), torch.zeros(1, 1, length, 1)),))  # 8 bytes a token


def test_the_least_recently_used_text_is_offloaded_first_and_copied_once() -> None:
    caches = TextCaches(lambda text: text_cache(len(text)), torch.device("cpu"), device_bytes=16, host_bytes=24)
    a, b, c, d = (1,), (2,), (3,), (4,)
    for text in (a, b, a, c):
        caches.get(text)
    assert [caches.distance(text) for text in (a, b, c, d)] == [0, 1, 0, 2]
    for text in (b, a):  # b comes back for a, then a for c
        caches.get(text)
    assert [caches.distance(text) for text in (a, b, c)] == [0, 0, 1]
    assert caches.counts == CacheCounts(hits=1, loads=2, builds=3, offloads=3)
    caches.get(d)  # for which b leaves, whose copy is still there
    assert caches.counts.offloads == 3


def test_the_host_forgets_what_was_wanted_longest_ago() -> None:
    caches = TextCaches(lambda text: text_cache(len(text)), torch.device("cpu"), device_bytes=8, host_bytes=16)
    a, b, c = (1,), (2,), (3,)
    for text in (a, b, c, a):  # the last one comes back from the host, and c takes the place of b there
        caches.get(text)
    assert [caches.distance(text) for text in (a, b, c)] == [0, 2, 1]
    assert caches.device_size == 8


def test_a_text_in_use_may_be_larger_than_the_budget() -> None:
    caches = TextCaches(lambda text: text_cache(len(text)), torch.device("cpu"), device_bytes=8, host_bytes=8)
    caches.get((1, 2))
    assert caches.distance((1, 2)) == 0
    caches.make_room()
    assert caches.distance((1, 2)) == 2


def test_samples_without_a_response_are_not_read() -> None:
    model = tiny_model("tied", seed=1)
    teacher = teacher_of(model)
    hidden = teacher.hidden([Sample("a", [1, 2, 3], 2, (1, 2), [])])
    assert hidden[0].shape == (0, model.config.hidden_size)
    assert teacher.caches.counts == CacheCounts()


def test_a_sample_without_a_prompt_of_its_own_is_refused() -> None:
    teacher = teacher_of(tiny_model("tied", seed=1))
    for sample in (Sample("a", [1, 2], 2, (1, 2), [5]), Sample("b", [1, 2], 0, (), [5])):
        with pytest.raises(ValueError, match="has no tokens"):
            teacher.hidden([sample])
