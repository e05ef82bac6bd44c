"""`python -m benchmarks.gpu`: all that is to be checked on a GPU, in one go. One process, and children for memory.

Needs torch, transformers and DeepSpeed, and neither Ray nor vLLM; where TRL is installed, its step is measured as well.
`--device cpu --tiny` runs the same code at sizes that say nothing, to try the script. The last line is one JSON object;
the exit code is 0 if the losses are as exact as they must be, 1 if not, 2 without a CUDA device.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, loss_memory, loss_time, step_vs_trl
from benchmarks.losses import LossCase
from benchmarks.models import QWEN3_1_7B, qwen3_like, random_model, random_samples
from benchmarks.step_vs_trl import StepCase, have_trl
from oel_ray.config.schema import ConsolidateConfig
from oel_ray.distill.loss import Logits, forward_kl, reverse_kl
from tests.support.naive_losses import divergence

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""The largest error of a gradient, which has the parameter's dtype, in units of the reference's largest value or of
one. The losses themselves are float32."""
_TEMPERATURE = 0.7


@dataclass(frozen=True, slots=True)
class Sizes:
    """What everything is measured at. `model` are values of a Qwen3 configuration."""

    loss: LossCase
    exact_tokens: int
    model: dict[str, Any]
    samples: int
    prompt: int
    knowledge: int
    response: int
    steps: int
    beside_trl: StepCase


def sizes(device: str, *, tiny: bool) -> Sizes:
    if tiny:
        return Sizes(
            loss=LossCase(64, 2000, 16, 8, device=device),
            exact_tokens=5,
            model=qwen3_like(32, 2, 300),
            samples=4,
            prompt=30,
            knowledge=20,
            response=5,
            steps=1,
            beside_trl=StepCase(20, 4, 2, 30, 5, 32, 2, 300, device=device),
        )
    return Sizes(
        loss=LossCase(device=device),
        exact_tokens=8,
        model=QWEN3_1_7B,
        samples=32,
        prompt=400,
        knowledge=2048,
        response=200,
        steps=3,
        beside_trl=StepCase(
            samples=32,
            width=1024,
            layers=28,
            vocabulary=QWEN3_1_7B["vocab_size"],
            precision="bfloat16",
            checkpointing=True,
            device=device,
        ),
    )


def exactness(size: Sizes, dtype: torch.dtype, *, forward: bool) -> dict[str, Any]:
    """The largest errors of value and gradients against float64 and autograd on whole logits."""
    case, device = size.loss, size.loss.device
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, scale: float) -> Tensor:
        return torch.randn(rows, case.width, generator=generator, device=device).mul_(scale).to(dtype)

    # over the temperature, the logits have a standard deviation of 10: hardly one is beyond 50
    scale = 10 * _TEMPERATURE / case.width**0.5
    student, teacher = ((normal(size.exact_tokens, scale), normal(case.vocabulary, 1)) for _ in range(2))
    weights_T = torch.rand(size.exact_tokens, generator=generator, device=device)

    hidden, head = (x.clone().requires_grad_() for x in student)
    loss_of: Callable[..., tuple[Tensor, Tensor]] = forward_kl if forward else reverse_kl
    models = Logits(hidden, head), Logits(*teacher)
    loss, kl_T = loss_of(*models, weights_T, temperature=_TEMPERATURE, chunk_tokens=3)
    ours = [loss.detach(), kl_T, *torch.autograd.grad(loss, (hidden, head))]

    hidden, head = (x.double().requires_grad_() for x in student)
    teacher_TV = teacher[0].double() @ teacher[1].double().T
    kl_T = divergence(hidden @ head.T / _TEMPERATURE, teacher_TV / _TEMPERATURE, forward=forward)
    loss = weights_T.double() @ kl_T
    reference = [loss.detach(), kl_T.detach(), *torch.autograd.grad(loss, (hidden, head))]

    errors = dict(zip(("loss", "kl", "hidden", "head"), map(_error, ours, reference), strict=True))
    values = max(errors["loss"], errors["kl"]) <= _TOLERANCE[torch.float32]
    passed = values and max(errors["hidden"], errors["head"]) <= _TOLERANCE[dtype]
    return {"divergence": "forward" if forward else "reverse", "dtype": str(dtype), "errors": errors, "passed": passed}


def optimizer_step(size: Sizes) -> dict[str, Any]:
    """Seconds and memory of `DistillStep` on one rank, after one step that does not count."""
    from oel_ray.distill.batches import micro_batches
    from oel_ray.distill.step import DistillStep

    device = size.loss.device
    config = ConsolidateConfig(workers=1, precision="bfloat16", kl_temperature=_TEMPERATURE)
    student = random_model(size.model, device)
    lengths = {"knowledge": size.knowledge, "prompt": size.prompt, "response": size.response}
    samples = random_samples(size.samples, size.model["vocab_size"], **lengths)
    step = DistillStep(student, copy.deepcopy(student), config, device)
    batches = micro_batches(samples, 0, 1, config.micro_batch_tokens)
    first = step.step(batches)
    assert first, step.shortage
    times: list[float] = []

    def steps() -> None:
        times.extend(harness.seconds(lambda: step.step(batches), device) for _ in range(size.steps))

    memory = harness.rise(steps, device)
    return {
        "parameters": sum(parameter.numel() for parameter in step.student.parameters()),
        "step_s": round(statistics.median(times), 3),
        "step_s_spread": [round(min(times), 3), round(max(times), 3)],
        "steps": size.steps,
        "held_gib": round(torch.cuda.memory_allocated() / 2**30, 2) if device == "cuda" else None,
        "transient_gib": round(memory / 2**30, 3),
        "samples": size.samples,
        "student_tokens": size.samples * (size.prompt + size.response),
        "teacher_tokens": size.samples * (size.knowledge + size.prompt + size.response),
        "response_tokens": first.tokens,
        "first_kl": first.kl_per_token,
        "precision": config.precision,
        "zero_stage": config.zero_stage,
    }


def _error(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference).abs().max() / reference.abs().max().clamp_min(1.0)).item()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that any machine does in seconds")
    parser.add_argument("--runs", type=int, default=3, help="repetitions of each measure of a loss")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device; try the script with --device cpu --tiny", file=sys.stderr)
        return 2
    size = sizes(options.device, tiny=options.tiny)
    exact = [exactness(size, dtype, forward=forward) for dtype in _TOLERANCE for forward in (False, True)]
    line: dict[str, Any] = {
        "name": "gpu",
        "machine": harness.machine(options.device),
        "passed": all(each["passed"] for each in exact),
        "exactness": exact,
    }
    for benchmark in (loss_memory.BENCHMARK, loss_time.BENCHMARK):
        line[benchmark.name] = benchmark.run(size.loss, options.runs)
    with harness.one_rank(options.device):
        line["step"] = optimizer_step(size)
    if have_trl():
        print(json.dumps(line), flush=True)  # all but one measure, in case TRL fails or does not fit
        line["step_vs_trl"] = step_vs_trl.BENCHMARK.run(size.beside_trl, options.runs)
    else:
        print("benchmarks.gpu: TRL is not installed: step_vs_trl is left out")
    print(json.dumps(line))
    return 0 if line["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
