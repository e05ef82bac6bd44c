import random
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from oel_ray.consolidate.batches import MicroBatch, Sample, micro_batches, token_weights
from oel_ray.consolidate.distiller import Distiller, check_linear_head, pad_tokens, teacher_hidden
from oel_ray.errors import UserError
from tests.consolidate.tiny import tiny_model, tiny_samples


def run(distiller: Distiller, teacher: Any, batches: list[MicroBatch]) -> tuple[float, dict[str, list[float]]]:
    """The loss over all micro-batches with gradients left in the model, and the KL of each sample's tokens."""
    distiller.zero_grad()
    total, kl = 0.0, {}
    for batch in batches:
        responses = [sample.response_ids for sample in batch.samples]
        student_batch = pad_tokens([s.student_prompt_ids for s in batch.samples], responses, "cpu")
        teacher_batch = pad_tokens([s.teacher_prompt_ids for s in batch.samples], responses, "cpu")
        weights = [w for response, w in zip(responses, batch.weights, strict=True) for _ in response]
        loss, kl_T = distiller(
            student_batch.tokens_BS,
            student_batch.mask_BS,
            student_batch.rows_T,
            teacher_hidden(teacher, teacher_batch),
            teacher.get_output_embeddings().weight,
            torch.tensor(weights),
        )
        loss.backward()
        total += loss.item()
        for sample, values in zip(batch.samples, kl_T.split([len(r) for r in responses]), strict=True):
            kl[sample.id] = values.tolist()
    return total, kl


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_padding_order_and_micro_batch_size_change_nothing(kind: str) -> None:
    samples = tiny_samples(6, seed=0)
    teacher = tiny_model(kind, seed=2)
    distiller = Distiller(tiny_model(kind, seed=1), temperature=0.7, chunk_tokens=4)
    alone = [MicroBatch((s,), (w,)) for s, w in zip(samples, token_weights(samples, "token"), strict=True)]
    loss, kl = run(distiller, teacher, alone)
    gradients = {name: p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None}
    shuffled = random.Random(0).sample(samples, len(samples))
    for batches in (
        micro_batches(samples, 0, 1, 6, loss_mean="token"),
        micro_batches(shuffled, 0, 1, 4, loss_mean="token"),
        [*alone, MicroBatch((samples[0],), (0.0,))],
    ):
        other_loss, other_kl = run(distiller, teacher, batches)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert all(other_kl[name] == pytest.approx(kl[name], rel=1e-4, abs=1e-5) for name in kl)
        for name, parameter in distiller.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_a_batch_without_a_response_token_has_loss_zero_and_gradients() -> None:
    model = tiny_model("tied", seed=1)
    distiller = Distiller(model, temperature=1.0, chunk_tokens=4)
    loss, _ = run(distiller, model, [MicroBatch((Sample("a", [1, 2], [3, 1, 2], []),), (0.0,))])
    assert loss == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in distiller.parameters())


def test_rows_are_the_positions_that_predict_the_response() -> None:
    batch = pad_tokens([[5, 6], [7]], [[8, 9], [10, 11, 12]], "cpu")
    assert batch.tokens_BS.tolist() == [[5, 6, 8, 9], [7, 10, 11, 12]]
    assert batch.rows_T.tolist() == [1, 2, 4, 5, 6]
    assert pad_tokens([[5]], [[6]], "cpu").mask_BS.tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="no tokens"):
        pad_tokens([[]], [[1]], "cpu")


def test_dropout_stays_off_in_training() -> None:
    distiller = Distiller(tiny_model("tied", seed=1), temperature=1.0, chunk_tokens=4).train()
    assert distiller.training and not any(module.training for module in distiller.student.modules())


def test_models_with_a_linear_head_pass_and_a_soft_cap_is_named() -> None:
    torch.manual_seed(0)
    gpt2_config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    gpt2: Any = GPT2LMHeadModel(gpt2_config)  # type: ignore[no-untyped-call]
    for model in (tiny_model("tied", 0), tiny_model("untied", 0), tiny_model("tied", 0).bfloat16(), gpt2.eval()):
        check_linear_head(model)
    size: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    gemma_config = Gemma2Config(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, **size)
    gemma: Any = Gemma2ForCausalLM(gemma_config)  # type: ignore[no-untyped-call]
    with pytest.raises(UserError, match="Gemma2ForCausalLM changes its logits"):
        check_linear_head(gemma.eval())
