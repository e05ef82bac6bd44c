"""What `step_vs_trl` compares with: TRL's training step on given responses, with a teacher that reads knowledge. The
process of a benchmark; needs TRL.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from benchmarks import harness
from oel_ray.config.schema import ConsolidateConfig
from oel_ray.distill.batches import Sample


@dataclass(frozen=True, slots=True)
class TrlStep:
    """What one optimizer step took, and found before it changed the weights."""

    seconds: float
    loss: float
    grad_norm: float


class TrlStudent:
    """A student with its optimizer in TRL's trainer, which takes a step on the same samples as often as it is told."""

    def __init__(
        self, student: Any, teacher: Any, samples: Sequence[Sample], batch: int, config: ConsolidateConfig, device: str
    ) -> None:
        """`batch` is the number of samples in one forward and backward pass; a step has all samples."""
        bfloat16 = config.precision == "bfloat16"  # the student's own weights stay float32
        if bfloat16:
            for parameter in teacher.parameters():  # these alone, or rotary frequencies would be rounded
                parameter.data = parameter.data.bfloat16()
        self._clock = _Clock(device)
        self._folder = tempfile.TemporaryDirectory()
        self._trainer = _KnowingTeacherTrainer(
            samples,
            model=student,
            teacher_model=teacher,
            args=DistillationConfig(
                output_dir=self._folder.name,
                beta=1.0,  # reverse KL
                temperature=config.temperature,
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                max_grad_norm=config.grad_clip,
                lr_scheduler_type="constant",
                bf16=bfloat16,
                gradient_checkpointing=config.gradient_checkpointing,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=len(samples) // batch,
                max_steps=1,
                use_cpu=device == "cpu",
                use_liger_kernel=device == "cuda" and find_spec("liger_kernel") is not None,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=[{"prompt": str(index)} for index in range(len(samples))],
            processing_class=_tokenizer(),
            callbacks=[self._clock],
        )
        self._trainer.remove_callback(PrinterCallback)

    def step(self) -> TrlStep:
        """From the trainer's `on_step_begin` to its `on_step_end`: no data loading, no logging."""
        self._trainer.losses.clear()
        self._trainer.train()
        norms = [line["grad_norm"] for line in self._trainer.state.log_history if "grad_norm" in line]
        return TrlStep(self._clock.seconds, sum(self._trainer.losses), float(norms[-1]))


class _KnowingTeacherTrainer(DistillationTrainer):
    """The trainer with given responses in place of generated ones, and a teacher with a prompt of its own.

    Whether a prompt is padded, both models' passes and the loss are TRL's.
    """

    def __init__(self, samples: Sequence[Sample], **settings: Any) -> None:
        super().__init__(**settings)
        self.losses: list[float] = []
        self._samples = samples
        self._teacher_prompts_BP: Tensor | None = None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        samples = [self._samples[int(line["prompt"])] for line in inputs]

        def stacked(rows: list[Sequence[int]]) -> Tensor:
            return torch.tensor([list(row) for row in rows], device=self.accelerator.device)

        prompt_ids = stacked([sample.student_prompt_ids for sample in samples])
        completion_ids = stacked([sample.response_ids for sample in samples])
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": torch.ones_like(prompt_ids),
            "completion_ids": completion_ids,
            "completion_mask": torch.ones_like(completion_ids),
            "num_items_in_batch": torch.tensor(completion_ids.numel(), device=self.accelerator.device),
            "teacher_prompt_ids": stacked([sample.teacher_prompt_ids for sample in samples]),
        }

    def _compute_loss(self, student: Any, inputs: dict[str, Tensor], *args: Any) -> Any:
        self._teacher_prompts_BP = inputs["teacher_prompt_ids"]
        return super()._compute_loss(student, inputs, *args)

    def _get_last_hidden_state(
        self, model: Any, input_ids: Tensor, mask: Tensor, completion: int, **others: Any
    ) -> Tensor:
        if model is self.accelerator.unwrap_model(self.teacher_model):
            assert self._teacher_prompts_BP is not None
            input_ids = torch.cat([self._teacher_prompts_BP, input_ids[:, -completion:]], dim=1)
            mask = torch.ones_like(input_ids)
        hidden: Tensor = super()._get_last_hidden_state(model, input_ids, mask, completion, **others)
        return hidden

    def training_step(self, *args: Any, **others: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **others)
        self.losses.append(loss.item())
        return loss


class _Clock(TrainerCallback):
    def __init__(self, device: str) -> None:
        self.seconds = 0.0
        self._device = device
        self._start = 0.0

    def on_step_begin(self, *_args: Any, **_others: Any) -> None:
        harness.wait(self._device)
        self._start = time.perf_counter()

    def on_step_end(self, *_args: Any, **_others: Any) -> None:
        harness.wait(self._device)
        self.seconds = time.perf_counter() - self._start


def _tokenizer() -> Any:
    """The trainer wants one; no text is ever read with it."""
    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))  # noqa: S106
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")  # noqa: S106
