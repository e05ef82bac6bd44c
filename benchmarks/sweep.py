"""What a benchmark is and its command line: one size, or with `--sweep` several, with a figure and a table of them. The
process of a benchmark.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from typing import Any, Generic, TypeVar

from benchmarks import harness

FIGURES = Path(__file__).parent / "figures"
Parts = Mapping[str, Sequence[float]]
"""Fields of a case, and what they are multiplied with in turn."""


@dataclass(frozen=True, slots=True)
class Case:
    """One size of a benchmark. Its fields are the options of the command line, their metadata argparse's keywords."""

    device: str = field(default="cpu", kw_only=True, metadata={"choices": ("cpu", "cuda")})


CaseT = TypeVar("CaseT", bound=Case)


@dataclass(frozen=True, slots=True)
class Benchmark(Generic[CaseT]):
    """A figure of two ways, named `above` and `below` as they are divided."""

    name: str
    goal: str
    unit: str
    above: str
    below: str
    case: CaseT
    """The size that the goal is for."""
    compare: Callable[[CaseT, int], tuple[harness.Pairs, dict[str, Any]]]
    """Measures a case so many times; and what else there is to say of it."""
    axes: Parts
    """What a sweep varies, one after the other."""
    also: Parts = field(default_factory=dict)
    """What is varied without a sweep."""
    runs: int = 3

    def run(self, case: CaseT, runs: int) -> dict[str, Any]:
        """The benchmark's result for one case."""
        pairs, details = self.compare(case, runs)
        medians = {self.above: _short(median(pairs.above)), self.below: _short(median(pairs.below))}
        machine = harness.machine(case.device)
        return harness.result(
            self.name, pairs, self.goal, machine, unit=self.unit, **medians, **details, **asdict(case)
        )

    def main(self) -> None:
        """The command line: options in, one JSON object in the last line out."""
        case, runs, folder = self._options()
        axes = self.axes if folder else self.also
        points: dict[CaseT, dict[str, Any]] = {}
        for point in _cases(case, axes):
            points[point] = self.run(point, runs)
            print(self._told(points[point]), flush=True)
        line = points[case]
        if len(points) > 1:
            keys = (*axes, self.above, self.below, "ratio", "spread")
            line = line | {"sweep": [{key: result[key] for key in keys} for result in points.values()]}
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{self.name}.md").write_text(self._table(points))
            self._plot(folder / f"{self.name}.svg", case, points)
        print(json.dumps(line))

    def _options(self) -> tuple[CaseT, int, Path | None]:
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{self.name}")
        for option in fields(self.case):
            kind: dict[str, Any] = {"action": "store_true"} if option.type is bool else {"type": option.type}
            default = getattr(self.case, option.name)
            parser.add_argument(f"--{option.name.replace('_', '-')}", default=default, **kind, **option.metadata)
        parser.add_argument("--runs", type=int, default=self.runs, help="measures of each way")
        parser.add_argument("--sweep", action="store_true", help="other sizes too, with a figure and a table of all")
        parser.add_argument("--out", type=Path, default=FIGURES, help="the folder for figure and table")
        options = vars(parser.parse_args())
        sweep, out, runs = options.pop("sweep"), options.pop("out"), options.pop("runs")
        return replace(self.case, **options), runs, out if sweep else None

    def _told(self, result: dict[str, Any]) -> str:
        size = ", ".join(f"{result[axis]:,} {axis}" for axis in self.axes)
        figures = ", ".join(f"{way} {result[way]:.3g} {self.unit}" for way in (self.above, self.below))
        return f"{size}: {figures}, ratio {result['ratio']:.2f}"

    def _table(self, points: Mapping[CaseT, dict[str, Any]]) -> str:
        columns = [*self.axes, f"{self.above} ({self.unit})", f"{self.below} ({self.unit})", "ratio", "of pairs"]
        rows = [columns, ["---"] * len(columns)]
        for result in points.values():
            size = [f"{result[axis]:,}" for axis in self.axes]
            figures = [f"{result[way]:g}" for way in (self.above, self.below)]
            low, high = result["spread"]
            rows.append([*size, *figures, f"{result['ratio']:.2f}", f"{low:.2f} to {high:.2f}"])
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)

    def _plot(self, file: Path, case: CaseT, points: Mapping[CaseT, dict[str, Any]]) -> None:
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        canvas = Figure(figsize=(max(5.0, 3.7 * len(self.axes)), 3.6), layout="constrained")
        panels = canvas.subplots(1, len(self.axes), sharey=True, squeeze=False)[0]
        for axes, axis in zip(panels, self.axes, strict=True):
            line = {getattr(p, axis): r for p, r in points.items() if _varied(p, axis, getattr(case, axis)) == case}
            sizes = sorted(line)
            for way, color, marker in ((self.above, "#d9822b", "s-"), (self.below, "#1f6f8b", "o-")):
                axes.plot(sizes, [line[size][way] for size in sizes], marker, color=color, label=way)
            axes.set(xlabel=axis, xscale="log", yscale="log")
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
            axes.minorticks_off()
            axes.grid(color="#dddddd")
        panels[0].set_ylabel(self.unit)
        panels[0].legend(frameon=False)
        told = self._told(points[case]).replace(": ", ":\n")
        canvas.suptitle(f"{self.name} around {told}\n{points[case]['machine']}", fontsize=8)
        with rc_context({"svg.hashsalt": self.name}):  # the same figures give the same bytes
            canvas.savefig(file, metadata={"Date": None})


def _short(figure: float) -> float:
    return float(f"{figure:.4g}")


def _cases(case: CaseT, axes: Parts) -> Iterator[CaseT]:
    yield case
    for axis, parts in axes.items():
        size = getattr(case, axis)
        for value in (int(size * part) for part in parts):
            if 0 < value != size:
                yield _varied(case, axis, value)


def _varied(case: CaseT, axis: str, value: int) -> CaseT:
    return replace(case, **{axis: value})  # type: ignore[arg-type]
