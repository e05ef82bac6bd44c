"""Join the student's forward pass with the loss. Training workers (Ray Train group); needs no Ray itself.

Shape suffixes: B sequences, S positions, T response tokens of a micro-batch, V vocabulary, D/E widths.
"""

from collections.abc import Callable
from typing import Any, Self

import deepspeed
import torch
from torch import Tensor, nn

from oel_ray.distill.inputs import LaidOut, response_hidden
from oel_ray.distill.loss import Logits, apply_soft_cap
from oel_ray.errors import UserError

Objective = Callable[[Logits, Logits, Tensor], tuple[Tensor, Tensor]]
"""`reverse_kl` or `forward_kl` with its options bound."""


class Distiller(nn.Module):
    """The module that DeepSpeed wraps: student body, head and loss in one forward pass.

    Under ZeRO-3 a parameter exists only while a module that is known to use it runs. The loss uses the head's weight
    without the head's own forward, so `_DistillLoss` declares it. DeepSpeed 0.19 also detects the first access, but
    only inside the forward of the module that it wraps.
    """

    def __init__(self, student: Any, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.loss = _DistillLoss(student.get_output_embeddings(), logit_soft_cap(student), objective)
        self.register_state_dict_post_hook(_drop_frozen)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Self:
        """Switch the mode, but keep dropout off, because the student must be the policy that wrote the responses."""
        super().train(mode)
        self.student.eval()
        for layer in self.student.modules():
            if getattr(layer, "gradient_checkpointing", False):
                layer.training = mode  # a layer recomputes if this flag of its own is set, not its children's
        return self

    def forward(self, texts: LaidOut, teacher: Logits, weights_T: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the divergence of the response tokens: the weighted sum, and the divergence of each token."""
        loss, kl_T = self.loss(response_hidden(self.student, texts), teacher, weights_T)
        return loss, kl_T


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Remove frozen parameters from a checkpoint. DeepSpeed itself would keep a frozen head that has two names."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


class _DistillLoss(nn.Module):
    """The loss as a module. ZeRO-3 then gathers the head for its forward and backward pass only."""

    def __init__(self, head: nn.Linear, soft_cap: float | None, objective: Objective) -> None:
        super().__init__()
        self._head = [head]  # in a list, because the head would otherwise get a second name in this module tree
        self._soft_cap = soft_cap
        self._objective = objective
        for parameter in head.parameters():
            deepspeed.zero.register_external_parameter(self, parameter)

    def forward(self, hidden_TD: Tensor, teacher: Logits, weights_T: Tensor) -> tuple[Tensor, Tensor]:
        head = self._head[0]
        return self._objective(Logits(hidden_TD, head.weight, head.bias, self._soft_cap), teacher, weights_T)


def logit_soft_cap(model: Any) -> float | None:
    """Return the bound that the model's configuration declares for its logits (Gemma 2), if any."""
    soft_cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return soft_cap


@torch.no_grad()
def check_linear_head(model: Any) -> None:
    """Make sure that the model's logits are head(last hidden state), soft-capped as its configuration declares.

    The loss computes them in this way. The check amplifies the head's output, so a later scale or another cap shows in
    a small model too. It stays low enough that a scale before a declared cap also shows.

    Raises:
        UserError: the model does something else to get its logits.
    """
    name = type(model).__name__
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{name} has no linear output head: consolidation needs a decoder-only language model")
    soft_cap = logit_soft_cap(model)
    peak = 100.0 if soft_cap is None else 2.0 * soft_cap
    seen: dict[str, Tensor] = {}

    def amplify(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["hidden"] = args[0]
        seen["head"] = output * (peak / output.abs().amax().clamp_min(1e-6))
        return seen["head"].clone()  # the model may go on in place

    tokens_BS = torch.arange(1, 5, device=head.weight.device).unsqueeze(0)
    hook = head.register_forward_hook(amplify)
    try:
        logits_BSV = model(input_ids=tokens_BS, use_cache=False).logits
    finally:
        hook.remove()
    hidden_BSD = model.base_model(input_ids=tokens_BS, use_cache=False).last_hidden_state
    if not (seen and _close(hidden_BSD, seen["hidden"]) and _close(apply_soft_cap(seen["head"], soft_cap), logits_BSV)):
        raise UserError(
            f"{name} changes its logits behind the output head (a scale, or a soft cap that its configuration does "
            "not declare as final_logit_softcapping): not supported"
        )


def _close(left: Tensor, right: Tensor) -> bool:
    """Compare shapes, and values up to the rounding of the coarser dtype."""
    tolerance = 4 * max(torch.finfo(left.dtype).eps, torch.finfo(right.dtype).eps)
    return left.shape == right.shape and torch.allclose(left.float(), right.float(), rtol=tolerance, atol=tolerance)
