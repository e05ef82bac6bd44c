import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from oel_ray.distill.batches import MicroBatch, Sample, micro_batches, token_weights
from oel_ray.distill.inputs import lay_out
from oel_ray.distill.loss import Logits, forward_kl, reverse_kl
from oel_ray.distill.module import Distiller, Objective, check_linear_head, logit_soft_cap
from oel_ray.distill.teacher import Teacher
from oel_ray.errors import UserError
from tests.support.naive_losses import divergence, soft_capped
from tests.support.tiny_training import VOCABULARY, tiny_model, tiny_samples


def gemma(seed: int) -> Any:
    """A float32 Gemma 2 whose soft cap bends its logits."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
        final_logit_softcapping=3.0,
    )
    model: Any = Gemma2ForCausalLM(config)  # type: ignore[no-untyped-call]
    return model.eval()


def run(
    distiller: Distiller, teacher: Any, batches: list[MicroBatch], *, packed: bool = False
) -> tuple[float, dict[str, list[float]]]:
    """The loss over all micro-batches with gradients left in the model, and the KL of each sample's tokens."""
    distiller.zero_grad()
    total, kl = 0.0, {}
    for batch in batches:
        responses = [sample.response_ids for sample in batch.samples]
        texts = lay_out([s.student_prompt_ids for s in batch.samples], responses, "cpu", packed=packed)
        weights = [w for response, w in zip(responses, batch.weights, strict=True) for _ in response]
        hidden_TE = torch.cat(Teacher(teacher, device_bytes=0, host_bytes=0).hidden(batch.samples))
        logits = Logits(hidden_TE, teacher.get_output_embeddings().weight, soft_cap=logit_soft_cap(teacher))
        loss, kl_T = distiller(texts, logits, torch.tensor(weights))
        loss.backward()
        total += loss.item()
        for sample, values in zip(batch.samples, kl_T.split([len(r) for r in responses]), strict=True):
            if values.numel():  # no filler
                kl[sample.id] = values.tolist()
    return total, kl


def objective(temperature: float) -> Objective:
    return partial(reverse_kl, temperature=temperature, chunk_tokens=4)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_padding_order_and_micro_batch_size_change_neither_loss_nor_gradients(kind: str) -> None:
    samples = tiny_samples(6, seed=0)
    teacher = tiny_model(kind, seed=2)
    distiller = Distiller(tiny_model(kind, seed=1), objective(0.7))
    alone = [MicroBatch((s,), (w,)) for s, w in zip(samples, token_weights(samples, "token"), strict=True)]
    loss, kl = run(distiller, teacher, alone)
    gradients = {name: p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None}
    shuffled = random.Random(0).sample(samples, len(samples))
    for batches in (
        micro_batches(samples, 0, 1, 1000, loss_mean="token"),
        micro_batches(shuffled, 0, 1, 40, loss_mean="token"),
        [*alone, MicroBatch((samples[0],), (0.0,))],
        [batch for rank in range(5) for batch in micro_batches(samples, rank, 5, 20, loss_mean="token")],
    ):
        other_loss, other_kl = run(distiller, teacher, batches)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert all(other_kl[name] == pytest.approx(kl[name], rel=1e-4, abs=1e-5) for name in kl)
        for name, parameter in distiller.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@settings(max_examples=15)
@given(count=st.integers(1, 7), seed=st.integers(0, 1000), budget=st.integers(1, 80))
def test_packed_samples_have_the_loss_and_gradients_of_padded_ones(
    attention: str, count: int, seed: int, budget: int
) -> None:
    samples, teacher, student = tiny_samples(count, seed), tiny_model("tied", 2), tiny_model("tied", 1)
    student.set_attn_implementation(attention)
    distiller = Distiller(student, objective(0.7))
    loss, kl = run(distiller, teacher, micro_batches(samples, 0, 1, budget))
    gradients = {name: p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None}
    packed, kl_packed = run(distiller, teacher, micro_batches(samples, 0, 1, budget, packed=True), packed=True)
    assert packed == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert all(kl_packed[name] == pytest.approx(kl[name], rel=1e-4, abs=1e-5) for name in kl)
    for name, parameter in distiller.named_parameters():
        assert parameter.grad is not None
        apart, largest = (parameter.grad - gradients[name]).abs().max(), gradients[name].abs().max()
        assert apart < 1e-5 * largest.clamp_min(1.0), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("changed", range(4))
def test_a_packed_sample_does_not_depend_on_its_neighbours(attention: str, changed: int) -> None:
    samples, teacher, student = tiny_samples(4, seed=3), tiny_model("tied", 2), tiny_model("tied", 1)
    student.set_attn_implementation(attention)
    distiller = Distiller(student, objective(0.7))
    other = replace(samples[changed], student_prompt_ids=[3, 4, 90, 17], response_ids=[8, 80, 8, 80, 8])
    _, kl = run(distiller, teacher, [MicroBatch(tuple(samples), (1.0,) * 4)], packed=True)
    samples[changed] = other
    _, kl_beside_another = run(distiller, teacher, [MicroBatch(tuple(samples), (1.0,) * 4)], packed=True)
    assert kl_beside_another[other.id] != pytest.approx(kl[other.id], rel=1e-2)
    for name in kl.keys() - {other.id}:
        assert kl_beside_another[name] == pytest.approx(kl[name], rel=1e-5, abs=1e-6)


def test_a_batch_without_a_response_token_has_loss_zero_and_gradients() -> None:
    model = tiny_model("tied", seed=1)
    distiller = Distiller(model, objective(1.0))
    loss, _ = run(distiller, model, [MicroBatch((Sample("a", [1, 2], 1, (3, 1), []),), (0.0,))])
    assert loss == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in distiller.parameters())


def test_rows_are_the_positions_that_predict_the_response() -> None:
    batch = lay_out([[5, 6], [7]], [[8, 9], [10, 11, 12]], "cpu")
    assert batch.tokens_BS.tolist() == [[5, 6, 8, 9], [7, 10, 11, 12]]
    assert batch.rows_T.tolist() == [1, 2, 4, 5, 6]
    assert batch.mask_BS is not None and batch.mask_BS.tolist() == [[1, 1, 1, 1]] * 2
    row = lay_out([[5, 6], [7]], [[8, 9], [10, 11, 12]], "cpu", packed=True)
    assert row.tokens_BS.tolist() == [[5, 6, 8, 9, 7, 10, 11, 12]]
    assert row.positions_BS is not None and row.positions_BS.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert row.rows_T.tolist() == [1, 2, 4, 5, 6]
    for packed in (False, True):
        with pytest.raises(ValueError, match="no tokens"):
            lay_out([[]], [[1]], "cpu", packed=packed)


def test_dropout_stays_off_in_training() -> None:
    distiller = Distiller(tiny_model("tied", seed=1), objective(1.0)).train()
    assert distiller.training and not any(module.training for module in distiller.student.modules())


@pytest.mark.parametrize("options", [{}, {"forward": True}, {"top_k": 9}, {"top_k": 9, "tail": False}], ids=str)
@pytest.mark.parametrize("kind", ["gemma", "untied"])
def test_loss_and_gradients_are_those_of_the_models_own_logits(kind: str, options: dict[str, Any]) -> None:
    student, teacher = (gemma(seed) if kind == "gemma" else tiny_model(kind, seed) for seed in (1, 2))
    samples = tiny_samples(5, seed=0)
    weights = token_weights(samples, "response")
    expected = torch.zeros(())
    for sample, weight in zip(samples, weights, strict=True):
        logits = []
        for model, prompt in ((student, sample.student_prompt_ids), (teacher, sample.teacher_prompt_ids)):
            tokens_BS = torch.tensor([[*prompt, *sample.response_ids]])
            logits.append(model(tokens_BS).logits[0, len(prompt) - 1 : -1] / 0.7)
        expected = expected + weight * divergence(logits[0], logits[1].detach(), **options).sum()
    expected.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}

    configured = forward_kl if options.get("forward") else partial(reverse_kl, **options)
    distiller = Distiller(student, partial(configured, temperature=0.7, chunk_tokens=4))
    loss, _ = run(distiller, teacher, micro_batches(samples, 0, 1, 30))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5), name


def test_models_with_a_linear_head_pass_also_with_a_declared_soft_cap() -> None:
    torch.manual_seed(0)
    gpt2_config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    gpt2: Any = GPT2LMHeadModel(gpt2_config)  # type: ignore[no-untyped-call]
    models = [tiny_model("tied", 0), tiny_model("untied", 0), tiny_model("tied", 0).bfloat16(), gpt2.eval()]
    for model in (*models, gemma(0), gemma(0).bfloat16()):
        check_linear_head(model)
    assert logit_soft_cap(gpt2) is None and logit_soft_cap(gemma(0)) == 3.0


class Changed(nn.Module):
    """A model that does something to its head's output that its configuration does not tell."""

    def __init__(self, model: Any, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.change = model, change
        self.config, self.base_model = model.config, model.base_model

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        with self.get_output_embeddings().register_forward_hook(lambda _module, _args, output: self.change(output)):
            return self.model(**inputs)


def test_models_that_change_their_logits_otherwise_are_refused() -> None:
    size: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    granite: Any = GraniteForCausalLM(GraniteConfig(**size, logits_scaling=4.0))  # type: ignore[no-untyped-call]
    cohere: Any = CohereForCausalLM(CohereConfig(**size, logit_scale=0.5, pad_token_id=0, eos_token_id=1))  # type: ignore[no-untyped-call]
    uncapped = tiny_model("tied", 0)
    uncapped.config.final_logit_softcapping = 30.0
    undeclared = Changed(tiny_model("tied", 0), lambda logits: soft_capped(logits, 30.0))
    scaled = [Changed(gemma(0), lambda logits: logits.mul_(0.8)), Changed(gemma(0), lambda logits: logits * 4.0)]
    for model in (granite.eval(), cohere.eval(), uncapped, undeclared, *scaled):
        with pytest.raises(UserError, match="changes its logits behind the output head"):
            check_linear_head(model)
