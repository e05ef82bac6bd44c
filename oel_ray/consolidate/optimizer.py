"""One optimisation step of consolidation under DeepSpeed. Training workers (Ray Train group); needs no Ray itself.

Needs an initialised torch.distributed process group, also with one rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_set_full_fp32_param
from torch.optim.lr_scheduler import LambdaLR

from oel_ray.config import ConsolidateConfig
from oel_ray.consolidate.batches import MicroBatch
from oel_ray.consolidate.distiller import Distiller, Divergence, check_linear_head, logit_soft_cap
from oel_ray.consolidate.loss import forward_kl, reverse_kl
from oel_ray.consolidate.reading import pad_tokens
from oel_ray.consolidate.teacher import Teacher

_GIB = 2**30
_Sum = tuple[float, int]


def deepspeed_config(config: ConsolidateConfig, world_size: int, device: str) -> dict[str, Any]:
    """DeepSpeed's configuration. `device` is "cpu" or "cuda".

    The caller decides how many micro-batches make a step, so DeepSpeed's own batch arithmetic is a formality.
    """
    stage = config.zero_stage
    if config.precision == "bfloat16":
        # Stage 0 would add up bfloat16 gradients in bfloat16; stage 1 is the first that does it in float32.
        stage = max(stage, 1)
    settings: dict[str, Any] = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.grad_clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.learning_rate,
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "weight_decay": config.weight_decay,
                # torch's own kernels: DeepSpeed's would be compiled on the spot, on every machine.
                "torch_adam": True,
                "fused": device == "cuda",
            },
        },
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "steps_per_print": 2**31,
    }
    if config.precision == "bfloat16":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings


def divergence(config: ConsolidateConfig) -> Divergence:
    """The configured divergence."""
    if config.divergence == "forward":
        return forward_kl
    top_k = None if config.divergence == "full" else config.top_k
    return partial(reverse_kl, top_k=top_k, tail=config.divergence == "top_k_tail")


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One step, the same on every rank. `applied` is False when it was skipped, and then `grad_norm` may be inf or nan.

    `kl` is the mean of the configured divergence over all response tokens, in nats per token, whatever the weights in
    `loss`; `kl_by_sample` is the mean over each response's own tokens, under the sample's id (0 for a response without
    a token).
    """

    loss: float
    kl: float
    tokens: int
    grad_norm: float
    learning_rate: float
    applied: bool
    kl_by_sample: dict[str, float]


class DistillStep:
    """Student, teacher and optimizer of one training rank."""

    def __init__(self, student: Any, teacher: Any, config: ConsolidateConfig, device: torch.device | str) -> None:
        """Every rank passes the same whole models, loaded from the same folder in any dtype.

        Both compute in `config.precision`. A float32 student gives its full precision to the masters.

        Raises:
            UserError: the logits of the model are not its output head's, soft-capped or as they are.
        """
        self.device = torch.device(device)
        self.world_size = dist.get_world_size()
        compute_dtype: torch.dtype = getattr(torch, config.precision)
        teacher = _cast_parameters(teacher.to(self.device).eval().requires_grad_(False), compute_dtype)
        if compute_dtype == torch.float32:
            student = _cast_parameters(student, torch.float32)
        check_linear_head(teacher)
        self.teacher = Teacher(
            teacher,
            device_bytes=config.teacher_cache_gib * _GIB,
            host_bytes=config.teacher_offload_gib * _GIB,
        )
        if config.gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        distiller = Distiller(
            student,
            temperature=config.temperature,
            chunk_tokens=config.chunk_tokens,
            divergence=divergence(config),
        )
        trained = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
        # DeepSpeed takes the masters from weights that it has rounded to bfloat16 already.
        masters = {p: p.detach().clone() for p in trained if p.dtype == torch.float32 != compute_dtype}
        warmup = max(config.warmup_steps, 1)
        # DeepSpeed would compile its shared-memory collectives on the spot: gloo needs no compiler and is enough.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.engine, *_ = deepspeed.initialize(
            model=distiller,
            model_parameters=trained,
            config=deepspeed_config(config, self.world_size, self.device.type),
            lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup)),
        )
        self.engine.train()
        for parameter, value in masters.items():
            safe_set_full_fp32_param(parameter, value)
        # Stage 0 is a bare torch optimizer: DeepSpeed neither checks its gradients nor keeps their norm, so the
        # step reduces them itself and looks at them before DeepSpeed takes over.
        self._bare_optimizer = self.engine.zero_optimization_stage() == 0
        if self._bare_optimizer:
            self.engine.enable_backward_allreduce = False

    @property
    def student(self) -> Any:
        """The model that is trained (under ZeRO-3 its parameters are partitioned: see `weights`)."""
        return self.engine.module.student

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepMetrics:
        """One optimizer step. Collective: every rank calls it with its own share of the same global batch.

        A loss or gradient that is not finite on any rank leaves the weights of all ranks as they are.
        """
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        kl_sums: dict[str, _Sum] = {}
        for batch, teacher_hidden_TE in zip(micro_batches, self._teacher_pass(micro_batches), strict=True):
            loss, kl_T = self._forward(batch, teacher_hidden_TE)
            loss_sum += loss.detach().double()
            _add(kl_sums, _kl_sums(batch, kl_T))
            # DeepSpeed averages gradients over ranks, and the loss is a sum over all of them. A loss that is not
            # finite is made to spoil the gradient for certain: gradients are what every rank gets to see.
            scale = self.world_size if math.isfinite(loss.item()) else math.nan
            self.engine.backward(loss * scale, scale_wrt_gas=False)
        dist.all_reduce(loss_sum)
        shares: list[dict[str, _Sum]] = [{} for _ in range(self.world_size)]
        dist.all_gather_object(shares, kl_sums)
        all_sums: dict[str, _Sum] = {}
        for share in shares:
            _add(all_sums, share)
        tokens = sum(count for _, count in all_sums.values())
        learning_rate = self.engine.get_lr()[0]
        applied, grad_norm = self._apply()
        return StepMetrics(
            loss=loss_sum.item(),
            kl=sum(total for total, _ in all_sums.values()) / max(tokens, 1),
            tokens=tokens,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            applied=applied,
            kl_by_sample={name: total / max(count, 1) for name, (total, count) in all_sums.items()},
        )

    def _teacher_pass(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """hidden_TE of every micro-batch.

        One without any knowledge is read exactly as the student reads it. The two then differ by nothing in the first
        step, and not by a rounding error: AdamW makes steps of the same size from small gradients as from large ones.
        """
        informed = [any(sample.has_knowledge for sample in batch.samples) for batch in micro_batches]
        together = [s for batch, known in zip(micro_batches, informed, strict=True) if known for s in batch.samples]
        hidden = iter(self.teacher.hidden(together))
        return [
            torch.cat([next(hidden) for _ in batch.samples] if known else self.teacher.reread(batch.samples))
            for batch, known in zip(micro_batches, informed, strict=True)
        ]

    def _forward(self, batch: MicroBatch, teacher_hidden_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of one micro-batch, and the KL of each of its response tokens, sample by sample."""
        responses = [sample.response_ids for sample in batch.samples]
        student = pad_tokens([sample.student_prompt_ids for sample in batch.samples], responses, self.device)
        weights = [w for response, w in zip(responses, batch.weights, strict=True) for _ in response]
        weights_T = torch.tensor(weights, dtype=torch.float32, device=self.device)
        head = self.teacher.model.get_output_embeddings()
        loss, kl_T = self.engine(
            student.tokens_BS,
            student.mask_BS,
            student.rows_T,
            teacher_hidden_TE,
            head.weight,
            weights_T,
            head.bias,
            logit_soft_cap(self.teacher.model),
        )
        return loss, kl_T

    def _apply(self) -> tuple[bool, float]:
        """Step the optimizer unless a gradient is not finite; whether it did, and the gradient norm before clipping."""
        if not self._bare_optimizer:
            self.engine.step()
            return self.engine.was_step_applied(), float(self.engine.get_global_grad_norm())
        self.engine.buffered_allreduce_fallback()
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self.engine.module.parameters()]).item()
        if not math.isfinite(grad_norm):
            self.engine.zero_grad()
            return False, grad_norm
        self.engine.step()
        return True, grad_norm


def _cast_parameters(model: Any, dtype: torch.dtype) -> Any:
    """Parameters only, as DeepSpeed does it: rounded rotary frequencies would set teacher and student apart."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _kl_sums(batch: MicroBatch, kl_T: torch.Tensor) -> dict[str, _Sum]:
    """Sum and number of token KLs of each sample. A filler adds nothing to the sample that it is made of."""
    pieces = torch.split(kl_T.double(), [len(sample.response_ids) for sample in batch.samples])
    return {sample.id: (piece.sum().item(), len(piece)) for sample, piece in zip(batch.samples, pieces, strict=True)}


def _add(sums: dict[str, _Sum], more: dict[str, _Sum]) -> None:
    for name, (total, count) in more.items():
        total_before, count_before = sums.get(name, (0.0, 0))
        sums[name] = (total_before + total, count_before + count)
