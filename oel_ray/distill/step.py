"""Do one optimizer step of consolidation under DeepSpeed. Training workers (Ray Train group); needs no Ray itself.

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
    """Bind the configured divergence to its options."""
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
    """The metrics of one step, equal on every rank. `applied` is False for a skipped step; `grad_norm` may then be inf
    or nan.

    `kl_per_token` is the mean of the configured divergence over all response tokens, in nats per token. It does not
    depend on the weights in `loss`. `kl_by_sample` is the mean over each response's own tokens, keyed by sample id (0
    for a response without a token).
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

        Both compute in `config.precision`. A float32 student passes its full precision to the masters. Weights that the
        student shares with the teacher are frozen and exist once (`lora`).

        Raises:
            UserError: the model's logits are not the output of its head, with or without a declared soft cap; or
            packing
                is required, and the model cannot read packed samples.
        """
        self.device = torch.device(device)
        self.world_size = dist.get_world_size()
        self.config = config
        self.updates = 0
        """Number of applied steps; determines the learning rate."""
        self.shortage = ""
        """After a step that ran out of memory: the ranks, and their memory by part; equal on every rank."""
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
        """Whether the samples of a micro-batch are packed into one row, without padding."""
        self._attention: str = student.config._attn_implementation
        self._teacher_reads_so = type(teacher) is type(student) and (can_pack(teacher) or not self.packs)
        if config.gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        distiller = Distiller(student, objective(config))
        self._trained = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
        # DeepSpeed copies the masters only after it has rounded the weights to bfloat16.
        masters = {p: p.detach().clone() for p in self._trained if p.dtype == torch.float32 != compute_dtype}
        # DeepSpeed would compile its shared-memory collectives at run time; gloo needs no compiler and is enough.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.engine, *_ = deepspeed.initialize(
            model=distiller,
            model_parameters=self._trained,
            config=deepspeed_config(config, self.world_size, self.device.type),
        )
        self.engine.train()
        for parameter, value in masters.items():
            safe_set_full_fp32_param(parameter, value)
        # Stage 0 is a bare torch optimizer. DeepSpeed neither checks its gradients nor keeps their norm, so this class
        # reduces and checks them before DeepSpeed's step.
        self._bare_optimizer = self.engine.zero_optimization_stage() == 0
        if self._bare_optimizer:
            self.engine.enable_backward_allreduce = False

    @property
    def student(self) -> Any:
        """The trained model. Under ZeRO-3 its parameters are partitioned, see `gather`."""
        return self.engine.module.student

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepMetrics | None:
        """Do one optimizer step. Collective: every rank calls it with its own share of the same global batch.

        If a loss or gradient is not finite on any rank, no rank changes its weights. The same holds if a rank ran out
        of memory. There are no metrics then, and all ranks may retry with smaller micro-batches.

        Raises:
            RunFailed: a rank ran out of memory where the others cannot be told; lists its memory by part.
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
            if is_out_of_memory(error):  # some weights may have changed already
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
        """List the memory of this rank in a step on these micro-batches, by part."""
        passes = [pass_shape([s.student_tokens for s in batch.samples], packed=self.packs) for batch in micro_batches]
        return memory_report(self.config, self.student, self.teacher, self.world_size, max(passes, key=math.prod))

    def _accumulate(self, micro_batches: Sequence[MicroBatch]) -> tuple[torch.Tensor, dict[str, _Sum], str]:
        """Accumulate the gradients of all micro-batches.

        Returns loss, KL sums, and the report if memory ran out, or "".
        """
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
            if self.engine.zero_optimization_stage() >= 2:  # the others reduce gradients after each backward pass
                self._join_collectives(micro_batches)
        return loss_sum, kl_sums, shortage

    def _join_collectives(self, micro_batches: Sequence[MicroBatch], *, spoil: bool = False) -> None:
        """Join the collectives of one pass with a minimal sample. With `spoil` it makes the gradients NaN."""
        batch = filler([sample for batch in micro_batches for sample in batch.samples])
        if spoil:  # with a response, because otherwise no gradient reaches the layers below a frozen head
            (sample,) = batch.samples
            batch = MicroBatch((replace(sample, response_ids=sample.student_prompt_ids[:1]),), (1.0,))
        head_VE = self.teacher.model.get_output_embeddings().weight
        self._pass(batch, head_VE.new_zeros(int(spoil), head_VE.shape[1]), spoil=spoil)

    def _recoverable_shortage(
        self, error: BaseException, micro_batches: Sequence[MicroBatch], *, in_collectives: bool
    ) -> str:
        """Describe an out-of-memory error from which all ranks can retreat together.

        That needs this rank to join every remaining collective. It cannot inside a student's pass under ZeRO-3, because
        each module has collectives of its own. It cannot after a bucket of gradients was reduced either.

        Raises:
            RunFailed: memory ran out, and the others cannot be told.
            BaseException: the error itself, if it is not an out-of-memory error.
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
        """Drop the gradients, as after a loss that is not finite, and halve the tokens of the teacher's passes."""
        self.teacher.pass_tokens = max(self.teacher.pass_tokens // 2, 1)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._join_collectives(micro_batches, spoil=True)
        applied, _ = self._apply()
        assert not applied

    def save(self, folder: Path) -> None:
        """Write masters and optimizer state, without frozen weights. Collective.

        `load` needs the same number of ranks and the same settings.
        """
        self.engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """Load the state that `save` wrote; frozen weights stay. Collective; call it before the first step."""
        whole = len(self._trained) == len(list(self.engine.module.parameters()))
        self.engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=whole)

    def _teacher_pass(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Compute hidden_TE of every micro-batch.

        A micro-batch without any knowledge is read exactly as the student reads it. The two models then agree to the
        bit in the first step. A rounding error would matter, because AdamW makes small gradients into steps as large as
        any.
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
        """Run forward and backward.

        Returns the loss of a micro-batch and the KL of its response tokens, sample by sample.
        """
        responses = [sample.response_ids for sample in batch.samples]
        prompts = [sample.student_prompt_ids for sample in batch.samples]
        texts = lay_out(prompts, responses, self.device, packed=self.packs)
        weights = [w for response, w in zip(responses, batch.weights, strict=True) for _ in response]
        weights_T = torch.tensor(weights, dtype=torch.float32, device=self.device)
        model = self.teacher.model
        head = model.get_output_embeddings()
        teacher = Logits(teacher_hidden_TE, head.weight, head.bias, logit_soft_cap(model))
        loss, kl_T = self.engine(texts, teacher, weights_T)
        # DeepSpeed averages gradients over ranks, but the loss is a sum over them. A loss that is not finite makes the
        # gradient NaN, because every rank sees the gradients.
        scale = math.nan if spoil or not math.isfinite(loss.item()) else self.world_size
        self.engine.backward(loss * scale, scale_wrt_gas=False)
        return loss.detach().double(), kl_T

    def _apply(self) -> tuple[bool, float]:
        """Step the optimizer if all gradients are finite.

        Returns whether it did, and the gradient norm before clipping.
        """
        if not self._bare_optimizer:
            self.engine.step()
            applied, optimizer = self.engine.was_step_applied(), self.engine.optimizer
            if self.config.offload_optimizer and not applied:  # else DeepSpeed adds the next gradients to these
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
    """Cast parameters only, as DeepSpeed does, because rounded rotary frequencies would make the teacher differ."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _kl_sums(batch: MicroBatch, kl_T: torch.Tensor) -> dict[str, _Sum]:
    """Sum and count the token KLs of each sample. A filler adds nothing to the sample that it was made from."""
    pieces = torch.split(kl_T.double(), [len(sample.response_ids) for sample in batch.samples])
    return {sample.id: (piece.sum().item(), len(piece)) for sample, piece in zip(batch.samples, pieces, strict=True)}


def _add(sums: dict[str, _Sum], more: dict[str, _Sum]) -> None:
    for name, (total, count) in more.items():
        total_before, count_before = sums.get(name, (0.0, 0))
        sums[name] = (total_before + total, count_before + count)
