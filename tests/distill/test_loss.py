from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oel_ray.distill.loss import Logits, forward_kl, reverse_kl
from tests.support.naive_losses import divergence, soft_capped

EXACT: list[dict[str, Any]] = [{}, {"forward": True}]
# Exact, the bare sum, the sum with a tail; also with supports that are larger than the vocabulary.
OBJECTIVES = [*EXACT, *({"top_k": k, "tail": tail} for k in (1, 3, 10, 1000) for tail in (True, False))]
SOFT_CAPS = [{}, {"student_soft_cap": 30.0, "teacher_soft_cap": 20.0}, {"teacher_soft_cap": 2.0}]
# Many logits at the cap: there 1 - tanh**2 is all rounding in float32, in autograd as well.
SATURATING = {"student_soft_cap": 5.0, "teacher_soft_cap": 30.0}


def dense(
    inputs: list[Tensor],
    weights_T: Tensor,
    temperature: float,
    student_soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    **objective: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The reference: float64, everything at once, autograd. Loss, KL, gradients of student hidden, head, bias."""
    hidden, head, bias, teacher_hidden, teacher_head, teacher_bias = (x.detach().double() for x in inputs)
    student = [hidden.requires_grad_(), head.requires_grad_(), bias.requires_grad_()]
    student_TV = soft_capped(hidden @ head.T + bias, student_soft_cap) / temperature
    teacher_TV = soft_capped(teacher_hidden @ teacher_head.T + teacher_bias, teacher_soft_cap) / temperature
    kl_T = divergence(student_TV, teacher_TV, **objective)
    loss = (weights_T.double() * kl_T).sum()
    return loss.detach(), kl_T.detach(), list(torch.autograd.grad(loss, student))


def ours(
    inputs: list[Tensor],
    weights_T: Tensor,
    temperature: float,
    chunk: int,
    forward: bool = False,
    student_soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    copies = [x.detach().clone() for x in inputs]
    wanted = [x.requires_grad_() for x in copies[:3]]
    student, teacher = Logits(*copies[:3], student_soft_cap), Logits(*copies[3:], teacher_soft_cap)  # type: ignore[misc]
    loss_of: Any = forward_kl if forward else reverse_kl
    loss, kl_T = loss_of(student, teacher, weights_T, temperature=temperature, chunk_tokens=chunk, **keywords)
    return loss.detach(), kl_T, list(torch.autograd.grad(loss, wanted))


def assert_equal(
    ours: tuple[Tensor, Tensor, list[Tensor]], reference: tuple[Tensor, Tensor, list[Tensor]], tolerance: float
) -> None:
    for value, expected in ((ours[0], reference[0]), (ours[1], reference[1]), *zip(ours[2], reference[2], strict=True)):
        assert relative_error(value, expected) < tolerance


def random_inputs(tokens: int, vocabulary: int, width: int, scale: float, seed: int) -> list[Tensor]:
    """Student hidden, head, bias and the teacher's; its width differs. Logits reach about +-`scale`."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for columns in (width, width + 3):
        hidden = torch.randn(tokens, columns, generator=generator)
        head = torch.randn(vocabulary, columns, generator=generator)
        peak = (hidden @ head.T).abs().amax().item() if tokens else 1.0
        inputs += [hidden * (scale / peak), head, torch.randn(vocabulary, generator=generator) * 0.1]
    return inputs


def random_weights(tokens: int, seed: int) -> Tensor:
    """Of every token, in [0, 1); every third is 0."""
    weights_T = torch.rand(tokens, generator=torch.Generator().manual_seed(seed))
    weights_T[::3] = 0.0
    return weights_T


def relative_error(value: Tensor, reference: Tensor) -> float:
    """The largest error in units of the largest reference value, or of one."""
    if not reference.numel():
        return 0.0
    return ((value.double() - reference).abs().max() / reference.abs().max().clamp_min(1.0)).item()


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 13),
    vocabulary=st.integers(2, 70),
    width=st.integers(1, 20),
    chunk=st.integers(1, 15),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    scale=st.sampled_from([0.01, 1.0, 10.0, 50.0]),
    soft_caps=st.sampled_from(SOFT_CAPS),
    objective=st.sampled_from(EXACT),
    seed=st.integers(0, 10_000),
)
def test_value_and_gradient_equal_a_dense_float64_reference(
    tokens: int,
    vocabulary: int,
    width: int,
    chunk: int,
    temperature: float,
    scale: float,
    soft_caps: dict[str, float],
    objective: dict[str, Any],
    seed: int,
) -> None:
    inputs = random_inputs(tokens, vocabulary, width, scale * temperature, seed)
    weights_T = random_weights(tokens, seed)
    reference = dense(inputs, weights_T, temperature, **soft_caps, **objective)
    assert_equal(ours(inputs, weights_T, temperature, chunk, **soft_caps, **objective), reference, 1e-5)


@settings(max_examples=120)
@given(
    tokens=st.integers(0, 13),
    vocabulary=st.integers(2, 70),
    chunk=st.integers(1, 15),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    scale=st.sampled_from([0.01, 1.0, 10.0, 50.0]),
    soft_caps=st.sampled_from([*SOFT_CAPS, SATURATING]),
    objective=st.sampled_from(OBJECTIVES),
    seed=st.integers(0, 10_000),
)
def test_all_objectives_equal_their_definitions_in_float64(
    tokens: int,
    vocabulary: int,
    chunk: int,
    temperature: float,
    scale: float,
    soft_caps: dict[str, float],
    objective: dict[str, Any],
    seed: int,
) -> None:
    # In float64 throughout: in float32 two words of nearly the same logit may change places at the support's edge.
    inputs = [x.double() for x in random_inputs(tokens, vocabulary, 8, scale, seed)]
    weights_T = random_weights(tokens, seed)
    reference = dense(inputs, weights_T, temperature, **soft_caps, **objective)
    values = ours(inputs, weights_T, temperature, chunk, **soft_caps, **objective)
    assert_equal(values, reference, 1e-10)
    assert_equal(ours(inputs, weights_T, temperature, tokens + 1, **soft_caps, **objective), values, 1e-10)
    if objective.get("tail"):
        exact = dense(inputs, weights_T, temperature, **soft_caps)[1]
        assert ((values[1] >= -1e-12) & (values[1] <= exact + 1e-10)).all()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("soft_caps", [{}, {"student_soft_cap": 20.0, "teacher_soft_cap": 5.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_objectives_in_lower_precision_equal_the_dense_reference(
    dtype: torch.dtype, soft_caps: dict[str, float], objective: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Each token's logits are evenly spread, so that the support is beyond doubt.
    spread = torch.stack([torch.randperm(50, generator=generator) for _ in range(7)]) * 0.5
    student = [spread, torch.eye(50), torch.zeros(50)]
    inputs = [x.to(dtype) for x in (*student, *random_inputs(7, 50, 50, 20.0, seed=1)[3:])]
    weights_T = random_weights(7, seed=0)
    reference = dense(inputs, weights_T, 2.0, **soft_caps, **objective)
    loss, kl_T, gradients = ours(inputs, weights_T, 2.0, 3, **soft_caps, **objective)
    assert_equal((loss, kl_T, []), (*reference[:2], []), 1e-5)
    # gradients arrive in the dtype of the parameters
    assert_equal((loss, kl_T, gradients), reference, 1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("objective", [*EXACT, {"top_k": 256}, {"top_k": 256, "tail": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_vocabulary_of_152_thousand_the_loss_equals_the_dense_reference(
    dtype: torch.dtype, objective: dict[str, Any]
) -> None:
    inputs = [x.to(dtype) for x in random_inputs(5, 151_936, 16, 50.0, seed=0)]
    weights_T = random_weights(5, seed=0)
    reference = dense(inputs, weights_T, 0.7, **objective)
    loss, kl_T, gradients = ours(inputs, weights_T, 0.7, 2, **objective)
    assert_equal((loss, kl_T, []), (*reference[:2], []), 1e-5)
    assert_equal((loss, kl_T, gradients), reference, 1e-5 if dtype == torch.float32 else 2**-8)


def test_a_larger_support_comes_closer_and_the_whole_vocabulary_is_exact() -> None:
    inputs = random_inputs(20, 60, 8, 5.0, seed=4)
    exact = ours(inputs, torch.ones(20), 1.0, 7)
    off = []
    for top_k in (1, 5, 20, 59, 60, 61):
        for tail in (True, False):
            values = ours(inputs, torch.ones(20), 1.0, 7, top_k=top_k, tail=tail)
            off.append((values[1] - exact[1]).abs().max().item())
            if top_k >= 60:
                assert_equal(values, exact, 1e-12)
    for each in (off[::2], off[1::2]):
        assert each == sorted(each, reverse=True) and each[0] > 0.1 and each[3] < 1e-2


def test_the_bare_sum_can_be_negative() -> None:
    student, teacher = (Logits(torch.tensor([[peak, 0.0, 0.0]]), torch.eye(3)) for peak in (1.0, 3.0))
    arguments: dict[str, Any] = {"temperature": 1.0, "chunk_tokens": 1, "top_k": 1}
    bare, _ = reverse_kl(student, teacher, torch.ones(1), tail=False, **arguments)
    with_tail, _ = reverse_kl(student, teacher, torch.ones(1), **arguments)
    assert bare < -0.1 and with_tail > 0.1


@pytest.mark.parametrize("objective", EXACT, ids=str)
def test_the_same_tensor_as_embedding_and_head_collects_both_gradients(objective: dict[str, Any]) -> None:
    hidden, head, _, teacher_hidden, teacher_head, _ = random_inputs(6, 30, 8, 5.0, seed=3)
    tokens_T = torch.tensor([1, 2, 3, 4, 5, 6])
    gradients = []
    for dtype in (torch.float32, torch.float64):
        weight = head.detach().to(dtype).clone().requires_grad_()
        embedded = torch.tanh(weight[tokens_T]) + hidden.to(dtype)
        if dtype == torch.float32:
            student, teacher = Logits(embedded, weight), Logits(teacher_hidden, teacher_head)
            ours = forward_kl if objective else reverse_kl
            loss, _ = ours(student, teacher, torch.ones(6), temperature=1.0, chunk_tokens=4)
        else:
            teacher_TV = teacher_hidden.double() @ teacher_head.double().T
            loss = divergence(embedded @ weight.T, teacher_TV, **objective).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        gradients.append(weight.grad)
    assert relative_error(gradients[0], gradients[1]) < 1e-5


@pytest.mark.parametrize("magnitude", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_with_extreme_logits_the_loss_stays_finite_accurate_and_never_negative(
    magnitude: float, objective: dict[str, Any], soft_cap: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    identity = torch.eye(40)
    logits = (torch.rand(64, 40, generator=generator) * 2 - 1) * magnitude
    near = logits + torch.randn(64, 40, generator=generator) * 1e-3
    far, sharper = -logits, 20 * logits
    for other in (logits, near, far, sharper):
        zero = torch.zeros(40)
        inputs = [logits, identity, zero, other, identity, zero]
        caps = {"student_soft_cap": soft_cap, "teacher_soft_cap": soft_cap}
        _, kl_T, gradients = ours(inputs, torch.ones(64), 1.0, 10, **caps, **objective)
        assert kl_T.isfinite().all() and (kl_T.min() >= -1e-6 or objective.get("tail") is False)
        if soft_cap is None:
            assert relative_error(kl_T, divergence(logits.double(), other.double(), **objective)) < 1e-5
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("objective", EXACT, ids=str)
def test_the_loss_is_zero_for_equal_distributions_and_only_for_them(objective: dict[str, Any]) -> None:
    hidden, head, bias, *_ = random_inputs(10, 50, 8, 20.0, seed=1)
    same = [hidden, head, bias]
    _, kl_T, gradients = ours([*same, *same], torch.ones(10), 0.7, 4, **objective)
    assert not kl_T.any() and not any(gradient.any() for gradient in gradients[1:])
    _, kl_T, gradients = ours([*same, hidden, head, bias + 3.0], torch.ones(10), 0.7, 4, **objective)
    assert kl_T.abs().max() < 1e-6
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-4
    other = bias.clone()
    other[7] += 0.5
    _, kl_T, _ = ours([hidden * 0.05, head, bias, hidden * 0.05, head, other], torch.ones(10), 0.7, 4, **objective)
    assert kl_T.min() > 1e-5


@pytest.mark.parametrize("loss_of", [reverse_kl, forward_kl])
def test_the_teacher_gets_no_gradient_and_no_grad_keeps_the_loss_value(loss_of: Any) -> None:
    inputs = [x.requires_grad_() for x in random_inputs(4, 20, 5, 5.0, seed=2)]
    arguments: dict[str, Any] = {"temperature": 1.0, "chunk_tokens": 3}
    models = Logits(inputs[0], inputs[1]), Logits(inputs[3], inputs[4])
    loss, kl_T = loss_of(*models, torch.ones(4), **arguments)
    loss.backward()  # type: ignore[no-untyped-call]
    assert not kl_T.requires_grad
    assert inputs[0].grad is not None and inputs[3].grad is None and inputs[4].grad is None
    with torch.no_grad():
        silent, _ = loss_of(*models, torch.ones(4), **arguments)
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


@pytest.mark.parametrize(
    "options", [*EXACT, {"top_k": 20, "student_soft_cap": 5.0}, {"top_k": 20, "tail": False}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_as_large_as_all_tokens_times_the_vocabulary(dtype: torch.dtype, options: dict[str, Any]) -> None:
    tokens, vocabulary, chunk = 200, 500, 8
    inputs = [x.to(dtype) for x in random_inputs(tokens, vocabulary, 4, 5.0, seed=0)]
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        ours(inputs, torch.ones(tokens), 1.0, chunk, **options)
    assert largest.numel == 3 * chunk * vocabulary < tokens * vocabulary / 8
