"""Reverse KL between two language models, from their final hidden states. Training workers (Ray Train group).

Shape suffixes: T response tokens, V vocabulary, D width of the student, E width of the teacher.

The objective is equation 2 of arXiv 2603.16856 with the token-level form of equation 4: at every response token
KL(student || teacher), exact over the whole vocabulary. Logits exist for `chunk_tokens` tokens at a time; the
gradient is computed in the forward pass, so nothing of size [T, V] is kept for the backward pass.
"""

from typing import Any

import torch
from torch import Tensor

# Heads of 16 bits are read in blocks of this many rows where the device cannot accumulate them in float32 itself.
_UPCAST_ROWS = 16_384


def reverse_kl(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_TE: Tensor,
    teacher_head_VE: Tensor,
    weights_T: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_t weights_T[t] * KL(softmax(student logits / temperature) || softmax(teacher logits / temperature)).

    Logits are `hidden @ head.T + bias`. They and everything behind them are float32 (float64 for float64 inputs),
    whatever the dtype of the inputs. Gradients flow to the student's hidden states, head and bias, none to the
    teacher or the weights; they can be taken once, not twice (`retain_graph` has no use here).

    Args:
        weights_T: the factor of each token in the sum; 0 removes a token.
        temperature: divides the logits of both models.
        chunk_tokens: tokens whose logits exist at a time: three buffers of [chunk_tokens, V] in float32.

    Returns:
        The loss, a scalar that backward can be called on, and the detached KL in nats of every token (kl_T).
    """
    if not torch.is_grad_enabled():  # a Function sees requires_grad even here, and would compute gradients in vain
        student_hidden_TD, student_head_VD = student_hidden_TD.detach(), student_head_VD.detach()
        student_bias_V = None if student_bias_V is None else student_bias_V.detach()
    loss, kl_T = _ReverseKL.apply(  # type: ignore[no-untyped-call]
        student_hidden_TD,
        student_head_VD,
        student_bias_V,
        teacher_hidden_TE.detach(),
        teacher_head_VE.detach(),
        None if teacher_bias_V is None else teacher_bias_V.detach(),
        weights_T.detach(),
        temperature,
        chunk_tokens,
    )
    return loss, kl_T


class _ReverseKL(torch.autograd.Function):
    """With z the logits over T and p their softmax: dKL/dz_s = p_s * ((log p_s - log p_t) - KL)."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden_TD: Tensor,
        student_head_VD: Tensor,
        student_bias_V: Tensor | None,
        teacher_hidden_TE: Tensor,
        teacher_head_VE: Tensor,
        teacher_bias_V: Tensor | None,
        weights_T: Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        tokens, vocabulary = student_hidden_TD.shape[0], student_head_VD.shape[0]
        exact = torch.promote_types(student_hidden_TD.dtype, torch.float32)
        device = student_hidden_TD.device
        weights_T = weights_T.to(exact)

        def zeros_or_none(like: Tensor | None, needed: bool) -> Tensor | None:
            return torch.zeros(like.shape, dtype=exact, device=device) if needed and like is not None else None

        grad_hidden_TD = zeros_or_none(student_hidden_TD, ctx.needs_input_grad[0])
        grad_head_VD = zeros_or_none(student_head_VD, ctx.needs_input_grad[1])
        grad_bias_V = zeros_or_none(student_bias_V, ctx.needs_input_grad[2])
        kl_T = torch.zeros(tokens, dtype=exact, device=device)

        # Allocated once: fresh pages for every chunk cost more on a CPU than the arithmetic on them.
        buffers_3CV = torch.empty((3, min(chunk_tokens, tokens), vocabulary), dtype=exact, device=device)
        for start in range(0, tokens, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, tokens))
            student_CV, teacher_CV, gap_CV = buffers_3CV[:, : chunk.stop - start]
            top_C1 = _shifted_logits(student_hidden_TD[chunk], student_head_VD, student_bias_V, temperature, student_CV)
            _shifted_logits(teacher_hidden_TE[chunk], teacher_head_VE, teacher_bias_V, temperature, teacher_CV)
            torch.sub(student_CV, teacher_CV, out=gap_CV)
            # Measured from the student's likeliest token: where nearly all probability lies there, the gradient is a
            # small difference that the plain gap would drown in rounding.
            top_gap_C1 = gap_CV.gather(1, top_C1)
            gap_CV.sub_(top_gap_C1)
            student_mass_C1 = student_CV.exp_().sum(dim=-1, keepdim=True)
            teacher_mass_C1 = teacher_CV.exp_().sum(dim=-1, keepdim=True)
            probability_CV = student_CV.div_(student_mass_C1)
            # KL = E_s[z_s - z_t] - log(mass_s / mass_t), and the gradient needs only the distance of each z_s - z_t
            # from that mean, without the masses. The sum of the three parts is taken in float64.
            mean_C1 = torch.einsum("cv,cv->c", probability_CV, gap_CV).unsqueeze(-1)
            log_ratio_C1 = student_mass_C1.double().log() - teacher_mass_C1.double().log()
            kl_T[chunk] = (mean_C1.double() + top_gap_C1.double() - log_ratio_C1).squeeze(-1).to(exact)

            factor_C1 = (weights_T[chunk] / temperature).unsqueeze(-1)
            grad_logits_CV = gap_CV.sub_(mean_C1).mul_(probability_CV).mul_(factor_C1)
            if grad_hidden_TD is not None:
                _add_product(grad_hidden_TD[chunk], grad_logits_CV, student_head_VD)
            if grad_head_VD is not None:
                _add_outer(grad_head_VD, grad_logits_CV, student_hidden_TD[chunk])
            if grad_bias_V is not None:
                grad_bias_V += grad_logits_CV.sum(dim=0)

        loss = torch.dot(weights_T.double(), kl_T.double()).to(exact)
        ctx.mark_non_differentiable(kl_T)
        ctx.save_for_backward(grad_hidden_TD, grad_head_VD, grad_bias_V)
        ctx.dtypes = [None if x is None else x.dtype for x in (student_hidden_TD, student_head_VD, student_bias_V)]
        return loss, kl_T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        # In place, as the head's gradient is large; a second backward would then fail on autograd's version check.
        student_gradients = (
            None if gradient is None else gradient.mul_(grad_outputs[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*student_gradients, None, None, None, None, None, None)


def _shifted_logits(
    hidden_CD: Tensor, head_VD: Tensor, bias_V: Tensor | None, temperature: float, out_CV: Tensor
) -> Tensor:
    """Write (logits - their maximum) / temperature, return the place of the maximum.

    Shifting before anything else keeps large logits exact.
    """
    if _accumulates_in_float32(head_VD):
        torch.mm(hidden_CD.to(head_VD.dtype), head_VD.T, out_dtype=torch.float32, out=out_CV)
    elif head_VD.dtype == hidden_CD.dtype == out_CV.dtype:
        torch.mm(hidden_CD, head_VD.T, out=out_CV)
    else:
        wide_CD = hidden_CD.to(out_CV.dtype)
        for rows in _row_blocks(head_VD):
            out_CV[:, rows] = wide_CD @ head_VD[rows].to(out_CV.dtype).T
    if bias_V is not None:
        out_CV.add_(bias_V)
    top_C1 = out_CV.argmax(dim=-1, keepdim=True)
    out_CV.sub_(out_CV.gather(1, top_C1))
    if temperature != 1.0:
        out_CV.mul_(1.0 / temperature)
    return top_C1


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
