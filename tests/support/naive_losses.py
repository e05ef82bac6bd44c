"""The objectives as they are defined, from whole logits and differentiable by autograd: what the others are held to."""

import torch
from torch import Tensor


def divergence(
    student_TV: Tensor, teacher_TV: Tensor, top_k: int | None = None, tail: bool = True, forward: bool = False
) -> Tensor:
    """The divergence of every token (kl_T), from logits over the temperature."""
    if forward:
        return divergence(teacher_TV, student_TV)
    log_student, log_teacher = student_TV.log_softmax(-1), teacher_TV.log_softmax(-1)
    terms_TV = log_student.exp() * (log_student - log_teacher)
    if top_k is None or top_k >= student_TV.shape[-1]:
        return terms_TV.sum(-1)
    inside = torch.zeros_like(student_TV, dtype=torch.bool).scatter(-1, student_TV.topk(top_k).indices, True)
    kl_T = terms_TV.masked_fill(~inside, 0.0).sum(-1)
    if tail:
        tail_student, tail_teacher = (
            x.masked_fill(inside, -torch.inf).logsumexp(-1) for x in (log_student, log_teacher)
        )
        kl_T = kl_T + tail_student.exp() * (tail_student - tail_teacher)
    return kl_T


def soft_capped(logits: Tensor, soft_cap: float | None) -> Tensor:
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
