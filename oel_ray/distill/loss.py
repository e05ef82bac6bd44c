"""Compute KL divergences of two language models from their final hidden states. Training workers (Ray Train group).

Shape suffixes: T response tokens, C tokens of a chunk, V vocabulary, D width of the student, E width of the teacher,
k words of the truncated forms.

The objective is equation 2 of arXiv 2603.16856 with the token-level form of equation 4. It is KL(student || teacher) at
every response token, exact over the whole vocabulary or from the student's likeliest words. The other direction is
KL(teacher || student). A divergence is a function of the two models' logits, shifted so that the likeliest word has 0.
All divergences share the rest. Logits exist for `chunk_tokens` tokens at a time. The gradient is computed in the
forward pass, so nothing of size [T, V] is kept for the backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

# 16-bit heads are read in blocks of this many rows if the device cannot accumulate their products in float32 itself.
_UPCAST_ROWS = 16_384
# The logits of this many of each model's likeliest words are computed in float64. Two words that share the probability
# need it; less likely words matter less.
_SHARP_WORDS = 4


@dataclass(frozen=True, slots=True)
class Logits:
    """The factors of a model's logits: `hidden @ head.T + bias`, then `cap * tanh(logits / cap)` if there is a cap.

    `soft_cap` is `final_logit_softcapping` of Gemma 2.
    """

    hidden_TD: Tensor
    head_VD: Tensor
    bias_V: Tensor | None = None
    soft_cap: float | None = None


def reverse_kl(
    student: Logits,
    teacher: Logits,
    weights_T: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    top_k: int | None = None,
    tail: bool = True,
) -> tuple[Tensor, Tensor]:
    """sum_t weights_T[t] * KL(softmax(student logits / temperature) || softmax(teacher logits / temperature)).

    Logits and all later values are float32 (float64 for float64 inputs), whatever the dtype of the inputs. For float32
    inputs the logits of the likeliest words are computed in float64. Value and gradient are then within 1e-5 of float64
    for logits up to 50. The widths of the two models may differ. Gradients flow to the student's hidden states, head
    and bias, and not to the teacher or the weights. Backward works once only, with `retain_graph` as well.

    Args:
        student: of the response tokens.
        teacher: of the same tokens, over the same vocabulary.
        weights_T: the factor of each token in the sum; 0 removes a token.
        temperature: divides the logits of both models.
        chunk_tokens: tokens whose logits exist at a time: three buffers of [chunk_tokens, V] in float32.
        top_k: use only the student's `top_k` likeliest words at every token. The choice of words counts as constant
            in the gradient. None, or the size of the vocabulary or more, gives the exact KL.
        tail: count all other words as one word, which gives a lower bound of the KL that is never negative. Without
            it they are left out of the sum, while probabilities stay those over the whole vocabulary (official code of
            arXiv 2603.16856). That sum is no divergence and can be negative.

    Returns:
        The loss, a scalar with a backward pass, and the detached KL of every token (kl_T), or its truncated form, in
        nats.
    """
    truncated = None if top_k is None or top_k >= student.head_VD.shape[0] else top_k
    divergence = partial(_reverse, top_k=truncated, tail=tail)
    return _weighted_sum(divergence, student, teacher, weights_T, temperature, chunk_tokens)


def forward_kl(
    student: Logits, teacher: Logits, weights_T: Tensor, *, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """sum_t weights_T[t] * KL(softmax(teacher logits / temperature) || softmax(student logits / temperature)).

    Always exact over the vocabulary. Arguments, precision, gradients and results are those of `reverse_kl`.
    """
    return _weighted_sum(_forward, student, teacher, weights_T, temperature, chunk_tokens)


@dataclass(frozen=True, slots=True)
class _Shifted:
    """(logits - their maximum) / temperature; `peak_C1` is the maximum, `top_C1` the word that has it."""

    logits_CV: Tensor
    top_C1: Tensor
    peak_C1: Tensor


_Divergence = Callable[[_Shifted, _Shifted, Tensor], Tensor]
"""(student, teacher, gradient_CV) -> the divergence of every token.

Writes the derivative by the student's logits over the temperature to `gradient_CV`. May overwrite the teacher's logits,
and must leave the student's.
"""


def _weighted_sum(
    divergence: _Divergence,
    student: Logits,
    teacher: Logits,
    weights_T: Tensor,
    temperature: float,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Compute the sum over tokens of weight times divergence, and the divergence of every token."""
    tensors: list[Tensor | None] = [student.hidden_TD, student.head_VD, student.bias_V]
    if not torch.is_grad_enabled():  # a Function sees requires_grad even here and would compute unused gradients
        tensors = [None if tensor is None else tensor.detach() for tensor in tensors]
    constants = student.soft_cap, divergence, teacher, weights_T, temperature, chunk_tokens
    loss, kl_T = _WeightedSum.apply(*tensors, *constants)  # type: ignore[no-untyped-call]
    return loss, kl_T


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden_TD: Tensor,
        student_head_VD: Tensor,
        student_bias_V: Tensor | None,
        student_soft_cap: float | None,
        divergence: _Divergence,
        teacher: Logits,
        weights_T: Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        tokens, vocabulary = student_hidden_TD.shape[0], student_head_VD.shape[0]
        exact = torch.promote_types(student_hidden_TD.dtype, torch.float32)
        device = student_hidden_TD.device
        student = Logits(student_hidden_TD, student_head_VD, student_bias_V, student_soft_cap)
        weights_T = weights_T.to(exact)
        factor_T1 = (weights_T / temperature).unsqueeze(-1)

        def zeros_or_none(like: Tensor | None, needed: bool) -> Tensor | None:
            return torch.zeros(like.shape, dtype=exact, device=device) if needed and like is not None else None

        grad_hidden_TD = zeros_or_none(student_hidden_TD, ctx.needs_input_grad[0])
        grad_head_VD = zeros_or_none(student_head_VD, ctx.needs_input_grad[1])
        grad_bias_V = zeros_or_none(student_bias_V, ctx.needs_input_grad[2])
        kl_T = torch.zeros(tokens, dtype=exact, device=device)

        # Allocated once, because on a CPU fresh pages for every chunk cost more than the arithmetic on them.
        buffers_3CV = torch.empty((3, min(chunk_tokens, tokens), vocabulary), dtype=exact, device=device)
        for start in range(0, tokens, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, tokens))
            student_CV, teacher_CV, gradient_CV = buffers_3CV[:, : chunk.stop - start]
            shifted = _shifted_logits(student, chunk, temperature, student_CV)
            shifted_teacher = _shifted_logits(teacher, chunk, temperature, teacher_CV)
            if student_head_VD.dtype == torch.float32:  # 16-bit weights are coarser than this correction
                _sharpen((student, shifted), (teacher, shifted_teacher), chunk=chunk, temperature=temperature)
            kl_T[chunk] = divergence(shifted, shifted_teacher, gradient_CV)
            gradient_CV.mul_(factor_T1[chunk])
            if student_soft_cap is not None:
                # 1 - tanh**2 from the capped logits, because there is no fourth buffer for the uncapped ones
                tanh_CV = student_CV.mul_(temperature).add_(shifted.peak_C1).div_(student_soft_cap)
                gradient_CV.mul_(tanh_CV.square_().neg_().add_(1.0))
            if grad_hidden_TD is not None:
                _add_product(grad_hidden_TD[chunk], gradient_CV, student_head_VD)
            if grad_head_VD is not None:
                _add_outer(grad_head_VD, gradient_CV, student_hidden_TD[chunk])
            if grad_bias_V is not None:
                grad_bias_V += gradient_CV.sum(dim=0)

        loss = torch.dot(weights_T.double(), kl_T.double()).to(exact)
        ctx.mark_non_differentiable(kl_T)
        ctx.save_for_backward(grad_hidden_TD, grad_head_VD, grad_bias_V)
        ctx.dtypes = [None if x is None else x.dtype for x in (student_hidden_TD, student_head_VD, student_bias_V)]
        return loss, kl_T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        # In place, because the head's gradient is large. A second backward then fails in autograd's version check.
        student_gradients = (
            None if gradient is None else gradient.mul_(grad_outputs[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*student_gradients, *[None] * 6)


def _reverse(student: _Shifted, teacher: _Shifted, gradient_CV: Tensor, *, top_k: int | None, tail: bool) -> Tensor:
    """KL(student || teacher), or a truncated form of it: a `_Divergence`.

    With p the student's probabilities and f = log p - log p_teacher: KL = E_p[f], with derivative p * (f - E_p[f]).
    The truncated forms replace f outside the support by one number per token. With a tail that is the log-ratio of the
    two models' probabilities outside. Without a tail it is -1. E_p[f] is then the sum over the support less the
    student's probability outside, and the derivative is that of the sum alone.
    """
    if top_k is not None:
        support_Ck = student.logits_CV.topk(top_k, sorted=False).indices
        if tail:
            log_tail_ratio_C1 = _log_tail(student.logits_CV, support_Ck, gradient_CV)
            log_tail_ratio_C1 -= _log_tail(teacher.logits_CV, support_Ck, gradient_CV)
    # f is this gap plus a number per token, which the derivative does not need.
    gap_CV, top_gap_C1 = _gap(student, teacher, gradient_CV)
    teacher_mass_C1 = teacher.logits_CV.exp_().sum(dim=-1, keepdim=True)
    probability_CV = torch.exp(student.logits_CV, out=teacher.logits_CV)
    student_mass_C1 = probability_CV.sum(dim=-1, keepdim=True)
    probability_CV.div_(student_mass_C1)
    offset_C1 = _offset(top_gap_C1, student_mass_C1, teacher_mass_C1)
    value_C1 = offset_C1
    if top_k is not None:
        inside_Ck = gap_CV.gather(1, support_Ck)
        outside_C1 = log_tail_ratio_C1 - top_gap_C1 if tail else -1.0 - offset_C1
        gap_CV.copy_(outside_C1).scatter_(1, support_Ck, inside_Ck)
        if not tail:
            value_C1 = offset_C1 + 1.0 - probability_CV.gather(1, support_Ck).double().sum(dim=-1, keepdim=True)
    mean_C1 = torch.einsum("cv,cv->c", probability_CV, gap_CV).unsqueeze(-1)
    gap_CV.sub_(mean_C1).mul_(probability_CV)
    return (value_C1 + mean_C1).squeeze(-1).to(gap_CV.dtype)


def _forward(student: _Shifted, teacher: _Shifted, gradient_CV: Tensor) -> Tensor:
    """KL(teacher || student): a `_Divergence`.

    With q the teacher's probabilities and f = log q - log p: KL = E_q[f], with derivative p - q.
    """
    gap_CV, top_gap_C1 = _gap(teacher, student, gradient_CV)
    teacher_CV = teacher.logits_CV.exp_()
    teacher_mass_C1 = teacher_CV.sum(dim=-1, keepdim=True)
    teacher_CV.div_(teacher_mass_C1)
    mean_C1 = torch.einsum("cv,cv->c", teacher_CV, gap_CV).unsqueeze(-1)
    student_CV = torch.exp(student.logits_CV, out=gradient_CV)
    student_mass_C1 = student_CV.sum(dim=-1, keepdim=True)
    student_CV.div_(student_mass_C1).sub_(teacher_CV)
    value_C1 = _offset(top_gap_C1, teacher_mass_C1, student_mass_C1) + mean_C1
    return value_C1.squeeze(-1).to(gradient_CV.dtype)


def _gap(first: _Shifted, second: _Shifted, out_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Write to `out_CV` the first logits less the second, less that difference at the first's likeliest word.

    Also returns the difference at that word. If the word has nearly all probability, the gradient is a small
    difference, which would be lost to rounding in the plain gap.
    """
    gap_CV = torch.sub(first.logits_CV, second.logits_CV, out=out_CV)
    top_gap_C1 = gap_CV.gather(1, first.top_C1)
    return gap_CV.sub_(top_gap_C1), top_gap_C1


def _offset(top_gap_C1: Tensor, first_mass_C1: Tensor, second_mass_C1: Tensor) -> Tensor:
    """Compute log(first probability / second probability) less the gap: one number per token, in float64."""
    log_ratio_C1 = first_mass_C1.double().log() - second_mass_C1.double().log()
    return top_gap_C1.double() - log_ratio_C1


def _log_tail(logits_CV: Tensor, support_Ck: Tensor, scratch_CV: Tensor) -> Tensor:
    """Compute the log of the sum of exp(logits) outside the support, in float64.

    Exact even if all these exp underflow.
    """
    scratch_CV.copy_(logits_CV).scatter_(1, support_Ck, -torch.inf)
    peak_C1 = scratch_CV.amax(dim=-1, keepdim=True)
    mass_C1 = scratch_CV.sub_(peak_C1).exp_().sum(dim=-1, keepdim=True)
    return peak_C1.double() + mass_C1.double().log()


def apply_soft_cap(logits: Tensor, soft_cap: float | None) -> Tensor:
    """Apply soft_cap * tanh(logits / soft_cap) in place, or nothing if there is no soft cap."""
    return logits if soft_cap is None else logits.div_(soft_cap).tanh_().mul_(soft_cap)


def _shifted_logits(model: Logits, chunk: slice, temperature: float, out_CV: Tensor) -> _Shifted:
    """Compute the shifted logits of the chunk's tokens into `out_CV`.

    The shift comes before the division and all else, because that keeps large logits exact.
    """
    _write_product(model.hidden_TD[chunk], model.head_VD, out_CV)
    if model.bias_V is not None:
        out_CV.add_(model.bias_V)
    apply_soft_cap(out_CV, model.soft_cap)
    top_C1 = out_CV.argmax(dim=-1, keepdim=True)
    peak_C1 = out_CV.gather(1, top_C1)
    out_CV.sub_(peak_C1)
    if temperature != 1.0:
        out_CV.mul_(1.0 / temperature)
    return _Shifted(out_CV, top_C1, peak_C1)


def _sharpen(*models: tuple[Logits, _Shifted], chunk: slice, temperature: float) -> None:
    """Recompute the shifted logits of either model's likeliest words in float64.

    The terms of a logit near 50 carry float32 rounding errors of up to 2e-6 each. Shifting does not remove them.
    Multiplied by a large hidden state they exceed the bound of 1e-5 on gradients.
    """
    top_Ck = [shifted.logits_CV.topk(min(_SHARP_WORDS, shifted.logits_CV.shape[1])).indices for _, shifted in models]
    for model, shifted in models:
        words_Ck = torch.cat([shifted.top_C1, *top_Ck], dim=1)
        logits_Ck = _float64_logits(model, chunk, words_Ck)
        exact_Ck = (logits_Ck - logits_Ck[:, :1]) / temperature
        shifted.logits_CV.scatter_(1, words_Ck, exact_Ck.to(shifted.logits_CV.dtype))


def _float64_logits(model: Logits, chunk: slice, words_Ck: Tensor) -> Tensor:
    """Compute the float64 logits of some words at every token of the chunk."""
    hidden_CD = model.hidden_TD[chunk].double()
    # Word by word, because all their head rows together could be larger than the logits of a small vocabulary.
    logits_Ck = torch.stack([(hidden_CD * model.head_VD[row_C]).sum(dim=-1) for row_C in words_Ck.unbind(dim=1)], dim=1)
    if model.bias_V is not None:
        logits_Ck += model.bias_V[words_Ck]
    return apply_soft_cap(logits_Ck, model.soft_cap)


def _write_product(hidden_CD: Tensor, head_VD: Tensor, out_CV: Tensor) -> None:
    """out_CV = hidden_CD @ head_VD.T."""
    if _accumulates_in_float32(head_VD):
        torch.mm(hidden_CD.to(head_VD.dtype), head_VD.T, out_dtype=torch.float32, out=out_CV)
    elif head_VD.dtype == hidden_CD.dtype == out_CV.dtype:
        torch.mm(hidden_CD, head_VD.T, out=out_CV)
    else:
        wide_CD = hidden_CD.to(out_CV.dtype)
        for rows in _row_blocks(head_VD):
            out_CV[:, rows] = wide_CD @ head_VD[rows].to(out_CV.dtype).T


def _add_product(grad_CD: Tensor, grad_logits_CV: Tensor, head_VD: Tensor) -> None:
    """grad_CD += grad_logits_CV @ head_VD."""
    if _accumulates_in_float32(head_VD):
        grad_CD += torch.mm(grad_logits_CV.to(head_VD.dtype), head_VD, out_dtype=torch.float32)
    elif head_VD.dtype == grad_CD.dtype:
        grad_CD.addmm_(grad_logits_CV, head_VD)
    else:
        for rows in _row_blocks(head_VD):
            grad_CD.addmm_(grad_logits_CV[:, rows], head_VD[rows].to(grad_CD.dtype))


def _add_outer(grad_VD: Tensor, grad_logits_CV: Tensor, hidden_CD: Tensor) -> None:
    """grad_VD += grad_logits_CV.T @ hidden_CD."""
    if _accumulates_in_float32(hidden_CD):
        grad_VD += torch.mm(grad_logits_CV.T.to(hidden_CD.dtype), hidden_CD, out_dtype=torch.float32)
    else:
        grad_VD.addmm_(grad_logits_CV.T, hidden_CD.to(grad_VD.dtype))


def _accumulates_in_float32(factor: Tensor) -> bool:
    """Whether the device multiplies 16-bit matrices into a float32 result (`out_dtype`, CUDA only)."""
    return factor.is_cuda and factor.dtype in (torch.bfloat16, torch.float16)


def _row_blocks(head_VD: Tensor) -> list[slice]:
    return [slice(row, row + _UPCAST_ROWS) for row in range(0, head_VD.shape[0], _UPCAST_ROWS)]
