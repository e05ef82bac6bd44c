"""What `loss_memory` and `loss_time` share: inputs and the two ways. The process of a benchmark.

The naive way is log-softmax of both models' whole logits, with no tensor kept longer than it must, and the rest left to
autograd. (torch's own `kl_div` with `log_target` is made of the same operations.) Both ways add to gradients that exist
already.
Shape suffixes: T tokens, V vocabulary, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.sweep import Case
from oel_ray.distill.loss import Logits, forward_kl, reverse_kl

Way = Literal["ours", "naive"]
AXES = {"tokens": (0.125, 0.25, 0.5, 1), "vocabulary": (0.125, 0.25, 0.5, 1), "width": (0.25, 0.5, 1, 2)}
"""What a sweep varies, in parts of the benchmark's size."""


@dataclass(frozen=True, slots=True)
class LossCase(Case):
    """One size of the benchmark. Student and teacher have heads of their own, of one shape."""

    tokens: int = 4096
    vocabulary: int = 151_936
    width: int = 512
    chunk_tokens: int = 256
    forward: bool = field(default=False, metadata={"help": "KL(teacher || student) in place of the reverse"})

    def inputs(self) -> tuple[Tensor, ...]:
        """hidden_TD and head_VD of the student, with gradients; those of the teacher; weights_T."""
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(rows: int, scale: float) -> Tensor:
            values = torch.randn(rows, self.width, generator=generator, device=self.device)
            return values.mul_(scale)

        tensors = [normal(rows, scale) for _ in range(2) for rows, scale in ((self.tokens, 3), (self.vocabulary, 0.1))]
        for tensor in tensors[:2]:
            tensor.requires_grad_()
            tensor.grad = torch.empty_like(tensor).fill_(0.0)  # `zeros` would leave the pages for later
        weights_T = torch.full((self.tokens,), 1.0 / self.tokens, device=self.device)
        return (*tensors, weights_T)


def prepare(way: Way, **case: Any) -> Callable[[], None]:
    """The loss and its backward pass, ready to run: a setup for `harness.transient_bytes`."""
    size = LossCase(**case)
    return loss_with_backward(way, size, size.inputs())


def loss_with_backward(way: Way, case: LossCase, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    hidden_TD, head_VD, teacher_hidden_TD, teacher_head_VD, weights_T = inputs

    def ours() -> None:
        student, teacher = Logits(hidden_TD, head_VD), Logits(teacher_hidden_TD, teacher_head_VD)
        loss_of = forward_kl if case.forward else reverse_kl
        loss, _ = loss_of(student, teacher, weights_T, temperature=1.0, chunk_tokens=case.chunk_tokens)
        loss.backward()  # type: ignore[no-untyped-call]

    def naive_kl() -> Tensor:  # a function, so that the backward pass begins without what only its locals hold
        log_student = (hidden_TD @ head_VD.T).log_softmax(-1)
        log_teacher = (teacher_hidden_TD @ teacher_head_VD.T).log_softmax(-1)
        first, second = (log_teacher, log_student) if case.forward else (log_student, log_teacher)
        return (first.exp() * (first - second)).sum(-1)

    def naive() -> None:
        (weights_T @ naive_kl()).backward()  # type: ignore[no-untyped-call]

    return ours if way == "ours" else naive
