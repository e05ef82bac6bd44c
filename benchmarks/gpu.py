"""`python -m benchmarks.gpu`: all that is to be checked on a GPU, in one go. One process, and children for memory.

Needs torch, transformers and DeepSpeed, and neither Ray nor vLLM. `--device cpu --tiny` runs the same code at sizes
that say nothing, to try the script. The last line is one JSON object; the exit code is 0 if the losses are as exact as
they must be, 1 if not, 2 without a CUDA device.
"""

import argparse
import copy
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import harness, loss_memory, loss_time
from benchmarks.losses import LossCase
from oel_ray.config import ConsolidateConfig
from oel_ray.consolidate.loss import forward_kl, reverse_kl
from tests.consolidate.naive import divergence

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


QWEN3_1_7B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
_TINY_MODEL = QWEN3_1_7B | {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def sizes(device: str, *, tiny: bool) -> Sizes:
    if tiny:
        return Sizes(LossCase(64, 2000, 16, 8, device=device), 5, _TINY_MODEL, 4, 10, 20, 5, 1)
    return Sizes(LossCase(device=device), 8, QWEN3_1_7B, 32, 400, 2048, 200, 3)


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
    loss, kl_T = loss_of(hidden, head, *teacher, weights_T, temperature=_TEMPERATURE, chunk_tokens=3)
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
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from oel_ray.consolidate.batches import micro_batches
    from oel_ray.consolidate.optimizer import DistillStep

    device = size.loss.device
    config = ConsolidateConfig(workers=1, kl_temperature=_TEMPERATURE)
    torch.manual_seed(0)
    with torch.device(device):
        student: Any = Qwen3ForCausalLM(Qwen3Config(**size.model))
    step = DistillStep(student, copy.deepcopy(student), config, device)
    batches = micro_batches(_samples(size), 0, 1, config.micro_batch_tokens)
    first = step.step(batches)
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
        "first_kl": first.kl,
        "precision": config.precision,
        "zero_stage": config.zero_stage,
    }


def _samples(size: Sizes) -> list[Any]:
    from oel_ray.consolidate.batches import Sample

    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(1, size.model["vocab_size"]) for _ in range(count)]

    head = 1
    samples, knowledge = [], tuple(tokens(head + size.knowledge))
    for index in range(size.samples):
        prompt = [*knowledge[:head], *tokens(size.prompt)]
        samples.append(Sample(str(index), prompt, head, knowledge, tokens(size.response)))
    return samples


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
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # DeepSpeed reads them
        backend = "nccl" if options.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        line["step"] = optimizer_step(size)
        dist.destroy_process_group()
    print(json.dumps(line))
    return 0 if line["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
