"""`python -m benchmarks.step_vs_trl`: wall time of a training step without generation, TRL / ours. One process. Needs
TRL, which the project itself does not.

TRL's nearest trainer is `DistillationTrainer`, its successor of GKD: exact reverse KL (`beta=1`) from both models'
hidden states, in chunks. It writes its own responses, and its teacher reads the student's tokens; a subclass gives it
responses and the teacher another prompt (`trl_trainer.py`), the rest is TRL's. (`SDFTTrainer` knows a teacher with a
prompt of its own, but makes both models' logits whole.) Ours is `DistillStep`: DeepSpeed, one rank.

Weights, samples, precision, attention, recomputation, AdamW and clipping are the same. What is in doubt is settled for
TRL: samples of one length, so that nothing is padded; one sample a pass or all at once, whichever is faster; its fused
AdamW, and on a GPU Liger's kernels if they are installed; no time for what its loop does around a step.

Ours reads a knowledge text once a round, before what is measured: `build_s` is what that costs. Loss and gradient norm
of the first step must agree, or it is not the same work and there is no result.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from benchmarks import harness
from benchmarks.models import qwen3_like, random_model, random_samples
from benchmarks.sweep import Benchmark, Case
from oel_ray.config.schema import ConsolidateConfig
from oel_ray.distill.batches import Sample, micro_batches
from oel_ray.distill.step import DistillStep, StepMetrics

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""How far loss and gradient norm may lie apart, as a part of TRL's. The order of sums differs, and in bfloat16 where
each side rounds."""
_SPREAD = 0.05
"""Of the random weights: with Qwen3's own 0.02 the knowledge would hardly change what the teacher says."""


@dataclass(frozen=True, slots=True)
class StepCase(Case):
    """A step's samples, of which every one has the same lengths, and a model in Qwen3's proportions."""

    knowledge: int = 2048
    samples: int = 4
    texts: int = field(default=2, metadata={"help": "knowledge texts that the samples share"})
    prompt: int = 400
    response: int = 200
    width: int = 512
    layers: int = 4
    vocabulary: int = 8192
    precision: str = field(default="float32", metadata={"choices": tuple(TOLERANCE)})
    checkpointing: bool = field(default=False, metadata={"help": "recompute activations, on both sides"})


def have_trl() -> bool:
    return find_spec("trl") is not None


def compare(case: StepCase, runs: int) -> tuple[harness.Pairs, dict[str, Any]]:
    settings = {"precision": case.precision, "gradient_checkpointing": case.checkpointing}
    config = ConsolidateConfig.model_validate(settings | {"workers": 1, "loss_mean": "token", "kl_temperature": 1.0})
    values = qwen3_like(case.width, case.layers, case.vocabulary) | {"initializer_range": _SPREAD}
    model = random_model(values, case.device)
    lengths = {"knowledge": case.knowledge, "prompt": case.prompt, "response": case.response}
    samples = random_samples(case.samples, case.vocabulary, texts=case.texts, **lengths)

    first, trl, batch = _fastest_of_trl(model, samples, config, case.device)
    with harness.one_rank(case.device):
        ours, metrics, build_s = _ready(model, samples, config, case.device)
        for name in ("loss", "grad_norm"):
            theirs, found = getattr(first, name), getattr(metrics, name)
            if not abs(found - theirs) <= TOLERANCE[case.precision] * abs(theirs):
                raise RuntimeError(f"not the same work: {name} is {theirs} in TRL and {found} here")
        pairs = harness.measure_pairs(lambda: trl.step().seconds, lambda: harness.seconds(ours, case.device), runs)
    details = {
        "build_s": round(build_s, 3),
        "loss": [first.loss, metrics.loss],
        "grad_norm": [first.grad_norm, metrics.grad_norm],
        "trl_batch": batch,
        "trl_version": version("trl"),
    }
    return pairs, details


def _fastest_of_trl(
    model: Any, samples: Sequence[Sample], config: ConsolidateConfig, device: str
) -> tuple[Any, Any, int]:
    """The first step, the student after two, and how many samples it takes at a time."""
    from benchmarks.trl_trainer import TrlStudent

    tried = []
    for batch in sorted({1, len(samples)}):
        student = TrlStudent(copy.deepcopy(model), copy.deepcopy(model), samples, batch, config, device)
        first = student.step()
        tried.append((student.step().seconds, batch, first, student))
    _, batch, first, student = min(tried, key=lambda each: each[0])
    return first, student, batch


def _ready(
    model: Any, samples: Sequence[Sample], config: ConsolidateConfig, device: str
) -> tuple[Callable[[], object], StepMetrics, float]:
    """Our step, its metrics the first time, and the seconds that its teacher takes to read the knowledge texts."""
    step = DistillStep(model, copy.deepcopy(model), config, device)
    batches = micro_batches(samples, 0, 1, config.micro_batch_tokens, loss_mean=config.loss_mean)

    def teacher_pass() -> float:
        return harness.seconds(lambda: step.teacher.hidden(samples), device)

    reading, kept = teacher_pass(), teacher_pass()
    first = step.step(batches)
    assert first, step.shortage
    return lambda: step.step(batches), first, reading - kept


BENCHMARK = Benchmark(
    name="step_vs_trl",
    goal=">= 1.5",
    unit="s",
    above="trl",
    below="ours",
    case=StepCase(),
    compare=compare,
    axes={"knowledge": (0.25, 0.5, 1, 2, 4)},
    also={"knowledge": (4,)},
)

if __name__ == "__main__":
    if not have_trl():
        print("benchmarks.step_vs_trl: TRL is not installed (pip install trl)", file=sys.stderr)
        sys.exit(2)
    BENCHMARK.main()
