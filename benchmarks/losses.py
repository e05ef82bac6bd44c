"""What `loss_memory` and `loss_time` share: inputs, the two ways, options, sweep, plot. The process of a benchmark.

The naive way is log-softmax of both models' whole logits, with no tensor kept longer than it must, and the rest left to
autograd. (torch's own `kl_div` with `log_target` is made of the same operations.) Both ways add to gradients that exist
already.
Shape suffixes: T tokens, V vocabulary, D width.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import harness
from oel_ray.consolidate.loss import forward_kl, reverse_kl

Way = Literal["ours", "naive"]
_AXES = {"tokens": (0.125, 0.25, 0.5, 1), "vocabulary": (0.125, 0.25, 0.5, 1), "width": (0.25, 0.5, 1, 2)}
"""What a sweep varies, in parts of the benchmark's size."""


@dataclass(frozen=True, slots=True)
class LossCase:
    """One size of the benchmark. Student and teacher have heads of their own, of one shape."""

    tokens: int = 4096
    vocabulary: int = 151_936
    width: int = 512
    chunk_tokens: int = 256
    forward: bool = False
    device: str = "cpu"

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


@dataclass(frozen=True, slots=True)
class LossBenchmark:
    """A figure of each way, and which of them is divided by the other. `gauge` gets one case ready."""

    name: str
    goal: str
    unit: str
    above: Way
    below: Way
    gauge: Callable[[LossCase], Callable[[Way], float]]

    def run(self, case: LossCase, runs: int) -> dict[str, Any]:
        """The benchmark's result for one case."""
        figure = self.gauge(case)
        pairs = harness.measure_pairs(lambda: figure(self.above), lambda: figure(self.below), runs)
        medians = {self.above: _short(median(pairs.above)), self.below: _short(median(pairs.below))}
        machine = harness.machine(case.device)
        return harness.result(self.name, pairs, self.goal, machine, unit=self.unit, **medians, **asdict(case))


def prepare(way: Way, **case: Any) -> Callable[[], None]:
    """The loss and its backward pass, ready to run: a setup for `harness.transient_bytes`."""
    size = LossCase(**case)
    return loss_with_backward(way, size, size.inputs())


def loss_with_backward(way: Way, case: LossCase, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    hidden_TD, head_VD, teacher_hidden_TD, teacher_head_VD, weights_T = inputs

    def ours() -> None:
        loss, _ = (forward_kl if case.forward else reverse_kl)(
            hidden_TD,
            head_VD,
            teacher_hidden_TD,
            teacher_head_VD,
            weights_T,
            temperature=1.0,
            chunk_tokens=case.chunk_tokens,
        )
        loss.backward()  # type: ignore[no-untyped-call]

    def naive_kl() -> Tensor:  # a function, so that the backward pass begins without what only its locals hold
        log_student = (hidden_TD @ head_VD.T).log_softmax(-1)
        log_teacher = (teacher_hidden_TD @ teacher_head_VD.T).log_softmax(-1)
        first, second = (log_teacher, log_student) if case.forward else (log_student, log_teacher)
        return (first.exp() * (first - second)).sum(-1)

    def naive() -> None:
        (weights_T @ naive_kl()).backward()  # type: ignore[no-untyped-call]

    return ours if way == "ours" else naive


def main(benchmark: LossBenchmark) -> None:
    """The command line of both benchmarks."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark.name}")
    for field in ("tokens", "vocabulary", "width", "chunk_tokens"):
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=getattr(LossCase(), field))
    parser.add_argument("--forward", action="store_true", help="KL(teacher || student) in place of the reverse")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--sweep", action="store_true", help="other sizes as well, and a plot of all in the folder --out"
    )
    parser.add_argument("--out", type=Path)
    options = vars(parser.parse_args())
    sweep, out, runs = options.pop("sweep"), options.pop("out"), options.pop("runs")
    if sweep != (out is not None):
        parser.error("--sweep and --out FOLDER go together")
    case = LossCase(**options)
    points = {}
    for point in _cases(case, sweep=sweep):
        points[point] = benchmark.run(point, runs)
        print(_told(points[point]), flush=True)
    line = points[case]
    if sweep:
        _plot(out / f"{benchmark.name}.png", case, points)
        keys = (*_AXES, "naive", "ours", "ratio", "spread")
        line = line | {"sweep": [{key: value[key] for key in keys} for value in points.values()]}
    print(json.dumps(line))


def _short(figure: float) -> float:
    return float(f"{figure:.4g}")


def _told(point: dict[str, Any]) -> str:
    size = ", ".join(f"{point[axis]:,} {axis}" for axis in _AXES)
    figures = ", ".join(f"{way} {point[way]:.3g} {point['unit']}" for way in ("naive", "ours"))
    return f"{size}: {figures}, ratio {point['ratio']:.2f}"


def _cases(case: LossCase, *, sweep: bool) -> Iterator[LossCase]:
    yield case
    if sweep:
        for axis, parts in _AXES.items():
            for value in (int(getattr(case, axis) * part) for part in parts):
                if 0 < value != getattr(case, axis):
                    yield _varied(case, axis, value)


def _varied(case: LossCase, axis: str, value: int) -> LossCase:
    return replace(case, **{axis: value})  # type: ignore[arg-type]


def _plot(file: Path, case: LossCase, points: dict[LossCase, dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, axis in zip(canvas.subplots(1, len(_AXES), sharey=True), _AXES, strict=True):
        line = {getattr(p, axis): r for p, r in points.items() if _varied(p, axis, getattr(case, axis)) == case}
        sizes = sorted(line)
        for way, color, marker in (("naive", "#d9822b", "s-"), ("ours", "#1f6f8b", "o-")):
            axes.plot(sizes, [line[size][way] for size in sizes], marker, color=color, label=way)
        axes.set(xlabel=axis, xscale="log", yscale="log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
        axes.minorticks_off()
        axes.grid(color="#dddddd")
    first = canvas.axes[0]
    first.set_ylabel(points[case]["unit"])
    first.legend(frameon=False)
    canvas.suptitle(f"{points[case]['name']} around {_told(points[case])}\n{points[case]['machine']}", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(file, dpi=160)
