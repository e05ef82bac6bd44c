from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oel_ray.consolidate.loss import reverse_kl


def dense(inputs: list[Tensor], weights_T: Tensor, temperature: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The reference: float64, everything at once, autograd. Loss, KL, gradients of student hidden, head, bias."""
    hidden, head, bias, teacher_hidden, teacher_head, teacher_bias = (x.detach().double() for x in inputs)
    student = [hidden.requires_grad_(), head.requires_grad_(), bias.requires_grad_()]
    log_student = ((hidden @ head.T + bias) / temperature).log_softmax(-1)
    log_teacher = ((teacher_hidden @ teacher_head.T + teacher_bias) / temperature).log_softmax(-1)
    kl_T = (log_student.exp() * (log_student - log_teacher)).sum(-1)
    loss = (weights_T.double() * kl_T).sum()
    return loss.detach(), kl_T.detach(), list(torch.autograd.grad(loss, student))


def ours(
    inputs: list[Tensor], weights_T: Tensor, temperature: float, chunk: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    hidden, head, bias, teacher_hidden, teacher_head, teacher_bias = (x.detach().clone() for x in inputs)
    student = [hidden.requires_grad_(), head.requires_grad_(), bias.requires_grad_()]
    loss, kl_T = reverse_kl(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        weights_T,
        temperature=temperature,
        chunk_tokens=chunk,
        student_bias_V=bias,
        teacher_bias_V=teacher_bias,
    )
    return loss.detach(), kl_T, list(torch.autograd.grad(loss, student))


def random_inputs(tokens: int, vocabulary: int, width: int, scale: float, seed: int) -> list[Tensor]:
    """Student hidden, head, bias and the teacher's; its width differs. Logits reach about +-`scale`."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for columns in (width, width + 3):
        hidden = torch.randn(tokens, columns, generator=generator)
        head = torch.randn(vocabulary, columns, generator=generator)
        peak = (hidden @ head.T).abs().amax().item() if tokens else 1.0
        inputs += [hidden * (0.9 * scale / peak), head, torch.randn(vocabulary, generator=generator) * 0.1]
    return inputs


def relative_error(value: Tensor, reference: Tensor) -> float:
    """The largest error in units of the largest reference value, or of one."""
    if not reference.numel():
        return 0.0
    return ((value.double() - reference).abs().max() / reference.abs().max().clamp_min(1.0)).item()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 13),
    vocabulary=st.integers(2, 70),
    width=st.integers(1, 20),
    chunk=st.integers(1, 15),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    scale=st.sampled_from([0.01, 1.0, 10.0, 50.0]),
    seed=st.integers(0, 10_000),
)
def test_value_and_gradient_equal_a_dense_float64_reference(
    tokens: int, vocabulary: int, width: int, chunk: int, temperature: float, scale: float, seed: int
) -> None:
    inputs = random_inputs(tokens, vocabulary, width, scale, seed)
    weights_T = torch.rand(tokens, generator=torch.Generator().manual_seed(seed))
    loss, kl_T, gradients = ours(inputs, weights_T, temperature, chunk)
    expected_loss, expected_kl_T, expected = dense(inputs, weights_T, temperature)
    assert relative_error(kl_T, expected_kl_T) < 1e-5
    assert relative_error(loss, expected_loss) < 1e-5
    for gradient, reference in zip(gradients, expected, strict=True):
        assert relative_error(gradient, reference) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_vocabulary(dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in random_inputs(5, 151_936, 16, 50.0, seed=0)]
    weights_T = torch.rand(5)
    loss, kl_T, gradients = ours(inputs, weights_T, 0.7, 2)
    expected_loss, expected_kl_T, expected = dense(inputs, weights_T, 0.7)
    assert relative_error(kl_T, expected_kl_T) < 1e-5
    assert relative_error(loss, expected_loss) < 1e-5
    for gradient, reference in zip(gradients, expected, strict=True):
        # gradients arrive in the dtype of the parameters
        assert relative_error(gradient, reference) < (1e-5 if dtype == torch.float32 else 2**-8)


def test_the_same_tensor_as_embedding_and_head_collects_both_gradients() -> None:
    hidden, head, _, teacher_hidden, teacher_head, _ = random_inputs(6, 30, 8, 5.0, seed=3)
    tokens_T = torch.tensor([1, 2, 3, 4, 5, 6])
    gradients = []
    for dtype in (torch.float32, torch.float64):
        weight = head.detach().to(dtype).clone().requires_grad_()
        embedded = torch.tanh(weight[tokens_T]) + hidden.to(dtype)
        if dtype == torch.float32:
            ones = torch.ones(6)
            loss, _ = reverse_kl(embedded, weight, teacher_hidden, teacher_head, ones, temperature=1.0, chunk_tokens=4)
        else:
            log_student = (embedded @ weight.T).log_softmax(-1)
            log_teacher = (teacher_hidden.double() @ teacher_head.double().T).log_softmax(-1)
            loss = (log_student.exp() * (log_student - log_teacher)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        gradients.append(weight.grad)
    assert relative_error(gradients[0], gradients[1]) < 1e-5


@pytest.mark.parametrize("magnitude", [1.0, 1e2, 1e4])
def test_extreme_logits_stay_finite_and_never_negative(magnitude: float) -> None:
    generator = torch.Generator().manual_seed(0)
    identity = torch.eye(40)
    logits = (torch.rand(64, 40, generator=generator) * 2 - 1) * magnitude
    near = logits + torch.randn(64, 40, generator=generator) * 1e-3
    far = -logits
    for other in (logits, near, far):
        zero = torch.zeros(40)
        _, kl_T, gradients = ours([logits, identity, zero, other, identity, zero], torch.ones(64), 1.0, 10)
        assert kl_T.isfinite().all() and kl_T.min() >= -1e-6
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_zero_for_equal_distributions_and_only_for_them() -> None:
    hidden, head, bias, *_ = random_inputs(10, 50, 8, 20.0, seed=1)
    _, kl_T, gradients = ours([hidden, head, bias, hidden, head, bias + 3.0], torch.ones(10), 0.7, 4)
    assert kl_T.abs().max() < 1e-6
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-4
    other = bias.clone()
    other[7] += 0.5
    _, kl_T, _ = ours([hidden * 0.05, head, bias, hidden * 0.05, head, other], torch.ones(10), 0.7, 4)
    assert kl_T.min() > 1e-5


def test_no_gradient_for_the_teacher_and_none_at_all_without_grad() -> None:
    inputs = [x.requires_grad_() for x in random_inputs(4, 20, 5, 5.0, seed=2)]
    arguments: dict[str, Any] = {"temperature": 1.0, "chunk_tokens": 3}
    loss, kl_T = reverse_kl(inputs[0], inputs[1], inputs[3], inputs[4], torch.ones(4), **arguments)
    loss.backward()  # type: ignore[no-untyped-call]
    assert not kl_T.requires_grad
    assert inputs[0].grad is not None and inputs[3].grad is None and inputs[4].grad is None
    with torch.no_grad():
        silent, _ = reverse_kl(inputs[0], inputs[1], inputs[3], inputs[4], torch.ones(4), **arguments)
    assert not silent.requires_grad and torch.equal(silent, loss)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the number of elements of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_tokens_and_the_vocabulary(dtype: torch.dtype) -> None:
    tokens, vocabulary, chunk = 200, 500, 8
    inputs = [x.to(dtype) for x in random_inputs(tokens, vocabulary, 4, 5.0, seed=0)]
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        ours(inputs, torch.ones(tokens), 1.0, chunk)
    assert largest.numel == 3 * chunk * vocabulary < tokens * vocabulary / 8
