"""One optimisation step of consolidation under DeepSpeed. Training workers (Ray Train group); needs no Ray itself.

Needs an initialised torch.distributed process group, also with one rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_set_full_fp32_param

from oel_ray.config.schema import ConsolidateConfig
from oel_ray.distill.batches import MicroBatch, filler, pass_shape
from oel_ray.distill.deepspeed_config import deepspeed_config
from oel_ray.distill.gather import FullWeights
from oel_ray.distill.inputs import attention_of, lay_out
from oel_ray.distill.loss import Logits, forward_kl, reverse_kl
from oel_ray.distill.module import Distiller, Objective, check_linear_head, logit_soft_cap
from oel_ray.distill.shortage import is_out_of_memory, memory_report
from oel_ray.distill.teacher import Teacher
from oel_ray.errors import RunFailed
from oel_ray.models.capabilities import can_pack, reads_packed

_GIB = 2**30
_TAG = "state"
_Sum = tuple[float, int]


def objective(config: ConsolidateConfig) -> Objective:
    """The configured divergence."""
    top_k = None if config.divergence == "full" else config.top_k
    reverse = partial(reverse_kl, top_k=top_k, tail=config.divergence == "top_k_tail")
    chosen = forward_kl if config.divergence == "forward" else reverse
    return partial(chosen, temperature=config.temperature, chunk_tokens=config.chunk_tokens)


def scheduled_rate(config: ConsolidateConfig, update: int) -> float:
    """Compute the learning rate of an update of the weights, counted from 0 in every round."""
    if update < config.warmup_steps:
        return config.learning_rate * (update + 1) / config.warmup_steps
    gone = (update - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    left = {"constant": 1.0, "linear": 1 - gone, "cosine": (1 + math.cos(math.pi * gone)) / 2}
    return config.learning_rate * left[config.schedule]


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One step, the same on every rank. `applied` is False when it was skipped, and then `grad_norm` may be inf or nan.

    `kl_per_token` is the mean of the configured divergence over all response tokens, in nats per token, whatever the
    weights in `loss`; `kl_by_sample` is the mean over each response's own tokens, under the sample's id (0 for a
    response without a token).
    """

    loss: float
    kl_per_token: float
    tokens: int
    grad_norm: float
    learning_rate: float
    applied: bool
    kl_by_sample: dict[str, float]


class DistillStep:
    """Student, teacher and optimizer of one training rank."""

    def __init__(self, student: Any, teacher: Any, config: ConsolidateConfig, device: torch.device | str) -> None:
        """Every rank passes the same whole models, loaded from the same folder in any dtype.

        Both compute in `config.precision`. A float32 student gives its full precision to the masters. What the student
        shares with the teacher is frozen, and is not there twice (`lora`).

        Raises:
            UserError: the logits of the model are not its output head's, soft-capped or as they are; or its samples are
                to be packed, and it cannot read them so.
        """
        self.device = torch.device(device)
        self.world_size = dist.get_world_size()
        self.config = config
        self.updates = 0
        """Steps that were applied; decides on the learning rate."""
        self.shortage = ""
        """After a step that ran out of memory: where, and what took it; the same on every rank."""
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
        self.packs = reads_packed(student, config.packing)
        """Whether the samples of a micro-batch are one row, without padding."""
        self._attention: str = student.config._attn_implementation
        self._teacher_reads_so = type(teacher) is type(student) and (can_pack(teacher) or not self.packs)
        if config.gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        distiller = Distiller(student, objective(config))
        self._trained = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
        # DeepSpeed takes the masters from weights that it has rounded to bfloat16 already.
        masters = {p: p.detach().clone() for p in self._trained if p.dtype == torch.float32 != compute_dtype}
        # DeepSpeed would compile its shared-memory collectives on the spot: gloo needs no compiler and is enough.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.engine, *_ = deepspeed.initialize(
            model=distiller,
            model_parameters=self._trained,
            config=deepspeed_config(config, self.world_size, self.device.type),
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

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepMetrics | None:
        """One optimizer step. Collective: every rank calls it with its own share of the same global batch.

        A loss or gradient that is not finite on any rank leaves the weights of all ranks as they are. So does a rank
        that ran out of memory: then there are no metrics, and all may try again with smaller micro-batches.

        Raises:
            RunFailed: a rank ran out of memory where the others cannot be told; says what took it.
        """
        if self.config.live_teacher:
            self.teacher.load_weights(FullWeights(self.student, self.teacher.model.dtype))
        loss_sum, kl_sums, shortage = self._accumulate(micro_batches)
        shares: list[tuple[dict[str, _Sum], str]] = [({}, "")] * self.world_size
        dist.all_gather_object(shares, (kl_sums, shortage))
        self.shortage = "; ".join(
            f"rank {rank} ran out of memory: {what}" for rank, (_, what) in enumerate(shares) if what
        )
        if self.shortage:
            self._discard(micro_batches)
            return None
        dist.all_reduce(loss_sum)
        all_sums: dict[str, _Sum] = {}
        for share, _ in shares:
            _add(all_sums, share)
        tokens = sum(count for _, count in all_sums.values())
        learning_rate = scheduled_rate(self.config, self.updates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        try:
            applied, grad_norm = self._apply()
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):  # some of the weights may have been changed
                raise RunFailed(f"out of memory in the optimizer: {self.memory_report(micro_batches)}") from error
            raise
        self.updates += applied
        return StepMetrics(
            loss=loss_sum.item(),
            kl_per_token=sum(total for total, _ in all_sums.values()) / max(tokens, 1),
            tokens=tokens,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            applied=applied,
            kl_by_sample={name: total / max(count, 1) for name, (total, count) in all_sums.items()},
        )

    def memory_report(self, micro_batches: Sequence[MicroBatch]) -> str:
        """Say what takes this rank's memory in a step on these micro-batches."""
        passes = [pass_shape([s.student_tokens for s in batch.samples], packed=self.packs) for batch in micro_batches]
        return memory_report(self.config, self.student, self.teacher, self.world_size, max(passes, key=math.prod))

    def _accumulate(self, micro_batches: Sequence[MicroBatch]) -> tuple[torch.Tensor, dict[str, _Sum], str]:
        """Gradients of all micro-batches; the loss, the KL sums, and what there is to say if memory ran out."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        kl_sums: dict[str, _Sum] = {}
        shortage, hidden = "", []
        try:
            hidden = self._teacher_pass(micro_batches)
        except (RuntimeError, MemoryError) as error:
            shortage = self._recoverable_shortage(error, micro_batches, in_collectives=False)
        for index, batch in enumerate(micro_batches):
            if not shortage:
                try:
                    loss, kl_T = self._pass(batch, hidden[index])
                except (RuntimeError, MemoryError) as error:
                    shortage = self._recoverable_shortage(error, micro_batches, in_collectives=True)
                else:
                    loss_sum += loss
                    _add(kl_sums, _kl_sums(batch, kl_T))
                    continue
            if self.engine.zero_optimization_stage() >= 2:  # the others reduce gradients behind each backward pass
                self._join_collectives(micro_batches)
        return loss_sum, kl_sums, shortage

    def _join_collectives(self, micro_batches: Sequence[MicroBatch], *, spoil: bool = False) -> None:
        """A pass over next to nothing, which leaves no gradient finite if it is to `spoil` them."""
        batch = filler([sample for batch in micro_batches for sample in batch.samples])
        if spoil:  # a response, or nothing would reach the layers below a frozen head
            (sample,) = batch.samples
            batch = MicroBatch((replace(sample, response_ids=sample.student_prompt_ids[:1]),), (1.0,))
        head_VE = self.teacher.model.get_output_embeddings().weight
        self._pass(batch, head_VE.new_zeros(int(spoil), head_VE.shape[1]), spoil=spoil)

    def _recoverable_shortage(
        self, error: BaseException, micro_batches: Sequence[MicroBatch], *, in_collectives: bool
    ) -> str:
        """Describe an out-of-memory error from which all ranks can retreat together.

        That needs this rank to join every collective that is left. It cannot inside a student's pass under ZeRO-3,
        where each module has its own, nor once a bucket of gradients was reduced.

        Raises:
            RunFailed: memory ran out, and the others cannot be told.
            BaseException: the error itself, if it is another.
        """
        if not is_out_of_memory(error):
            raise error
        stage, optimizer = self.engine.zero_optimization_stage(), self.engine.optimizer
        said = self.memory_report(micro_batches)
        if in_collectives and (stage == 3 or (stage == 2 and any(optimizer.params_already_reduced))):
            raise RunFailed(f"out of memory: {said}") from error
        if in_collectives and stage == 2:
            optimizer.extra_large_param_to_reduce.clear()
            for bucket in optimizer.ipg_buckets.values():
                bucket.clear()
        return said

    def _discard(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Forget the gradients, as after a loss that is not finite, and have the teacher take smaller bites."""
        self.teacher.pass_tokens = max(self.teacher.pass_tokens // 2, 1)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._join_collectives(micro_batches, spoil=True)
        applied, _ = self._apply()
        assert not applied

    def save(self, folder: Path) -> None:
        """Write masters and optimizer state, and nothing that is frozen. Collective.

        `load` needs as many ranks, and the same settings.
        """
        self.engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote, beside the frozen weights that are there. Collective; before the first step."""
        whole = len(self._trained) == len(list(self.engine.module.parameters()))
        self.engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=whole)

    def _teacher_pass(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """hidden_TE of every micro-batch.

        One without any knowledge is read exactly as the student reads it. The two then differ by nothing in the first
        step, and not by a rounding error: AdamW makes steps of the same size from small gradients as from large ones.
        """
        informed = [any(sample.has_knowledge for sample in batch.samples) for batch in micro_batches]
        together = [s for batch, known in zip(micro_batches, informed, strict=True) if known for s in batch.samples]
        hidden = iter(self.teacher.hidden(together))
        return [
            torch.cat([next(hidden) for _ in batch.samples] if known else self._read_as_student(batch))
            for batch, known in zip(micro_batches, informed, strict=True)
        ]

    def _read_as_student(self, batch: MicroBatch) -> list[torch.Tensor]:
        if not self._teacher_reads_so:
            return self.teacher.reread(batch.samples)
        with attention_of(self.teacher.model, self._attention):
            return self.teacher.reread(batch.samples, packed=self.packs)

    def _pass(
        self, batch: MicroBatch, teacher_hidden_TE: torch.Tensor, *, spoil: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward: the loss of a micro-batch, and the KL of its response tokens, sample by sample."""
        responses = [sample.response_ids for sample in batch.samples]
        prompts = [sample.student_prompt_ids for sample in batch.samples]
        texts = lay_out(prompts, responses, self.device, packed=self.packs)
        weights = [w for response, w in zip(responses, batch.weights, strict=True) for _ in response]
        weights_T = torch.tensor(weights, dtype=torch.float32, device=self.device)
        model = self.teacher.model
        head = model.get_output_embeddings()
        teacher = Logits(teacher_hidden_TE, head.weight, head.bias, logit_soft_cap(model))
        loss, kl_T = self.engine(texts, teacher, weights_T)
        # DeepSpeed averages gradients over ranks, and the loss is a sum over all of them. A loss that is not
        # finite is made to spoil the gradient for certain: gradients are what every rank gets to see.
        scale = math.nan if spoil or not math.isfinite(loss.item()) else self.world_size
        self.engine.backward(loss * scale, scale_wrt_gas=False)
        return loss.detach().double(), kl_T

    def _apply(self) -> tuple[bool, float]:
        """Step the optimizer unless a gradient is not finite; whether it did, and the gradient norm before clipping."""
        if not self._bare_optimizer:
            self.engine.step()
            applied, optimizer = self.engine.was_step_applied(), self.engine.optimizer
            if self.config.offload_optimizer and not applied:  # DeepSpeed would add the next gradients to these
                optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
            return applied, float(self.engine.get_global_grad_norm())
        self.engine.buffered_allreduce_fallback()
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None]).item()
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
