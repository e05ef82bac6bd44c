"""The report's figures, each as SVG for the page and as PNG beside it. Any process; needs matplotlib."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from oel_ray.evaluate.metrics import Score
from oel_ray.report.data import Report, RoundData, Z

POLICY, CONTEXT, RANDOM, ORACLE, INK, FAINT = "#1f6f8b", "#d9822b", "#9a9a9a", "#5a8f4e", "#2b2b2b", "#dddddd"
STAGES = {
    "collect": "#7fb3c8",
    "extract": "#d9822b",
    "evaluate_in_context": "#f0c08a",
    "consolidate": "#1f6f8b",
    "evaluate": "#b8c9a9",
}
STYLE = {
    "svg.hashsalt": "oel-ray",
    "svg.fonttype": "none",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "figure.facecolor": "white",
    "legend.frameon": False,
}
_STEPS_WIDTH = 1.0
"""Width of a round's accumulation axis, where the distance between two policies is one too."""


class Figure(NamedTuple):
    """A figure in both forms. `caption` says what is to be seen, in a sentence or two."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def figures(report: Report) -> list[Figure]:
    """The figures that the run has data for."""
    drawn = []
    for name, title, caption, has_data, draw in _FIGURES:
        if has_data(report):
            with _figure() as (canvas, axes):
                draw(report, axes)
                drawn.append(Figure(name, title, caption, *_rendered(canvas)))
    return drawn


@contextmanager
def _figure() -> Iterator[tuple[Any, Any]]:
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 3.6), layout="constrained")
        yield canvas, canvas.add_subplot()


def _rendered(canvas: Any) -> tuple[str, bytes]:
    svg, png = io.StringIO(), io.BytesIO()
    canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    canvas.savefig(png, format="png", dpi=160, metadata={"Software": None})
    text = svg.getvalue()
    return text[text.index("<svg") :], png.getvalue()


def _pass_rate(report: Report, axes: Any) -> None:
    """Figure 4 of the paper: up a round's accumulation, then the policy that it was distilled into."""
    axes.plot(*_policy_line(report, lambda value: value.pass_rate), color=POLICY, lw=1.2, zorder=2)
    _points(axes, [(number, value) for number, value in report.evaluated], POLICY, "o", "policy, nothing in its prompt")
    _climbs(axes, report)
    for name, color in (("random", RANDOM), ("oracle", ORACLE)):
        rate = next((getattr(value, name) for _, value in report.evaluated if getattr(value, name) is not None), None)
        if rate is not None:
            axes.axhline(rate, color=color, lw=1.2, ls=(0, (5, 3)), label=f"{name} player", zorder=1)
    axes.set(ylim=(-0.02, 1.04), ylabel="games won")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    _rounds_axis(report, axes)
    _legend(axes)


def _climbs(axes: Any, report: Report) -> None:
    """From the policy before, without knowledge, to the same policy with all of it in its prompt."""
    before = dict(report.evaluated)
    reached = [(data.number - 1 + _STEPS_WIDTH / 2, data.in_context) for data in report.rounds if data.in_context]
    for place, value in reached:
        if start := before.get(int(place)):
            axes.plot([int(place), place], [start.pass_rate, value.pass_rate], color=CONTEXT, lw=1.2, ls=":", zorder=2)
    _points(axes, reached, CONTEXT, "D", "the policy before, with the knowledge in its prompt")
    for data in report.rounds:
        if data.in_context and data.knowledge:
            read = max(text.read for text in data.knowledge)
            axes.annotate(
                f"{read} games read",
                (data.number - 0.5, data.in_context.pass_rate),
                textcoords="offset points",
                xytext=(0, -16 if data.in_context.pass_rate > 0.5 else 12),
                ha="center",
                fontsize=8,
                color=CONTEXT,
            )


def _tokens(report: Report, axes: Any) -> None:
    """Figure 5 of the paper."""
    axes.plot(*_policy_line(report, lambda value: value.response_tokens_per_turn), "o-", color=POLICY, label="policy")
    seen = [(data.number - 0.5, data.in_context) for data in report.rounds if data.in_context]
    if seen:
        places, values = zip(*seen, strict=True)
        lengths = [value.response_tokens_per_turn for value in values]
        axes.plot(places, lengths, "D", color=CONTEXT, label="with the knowledge in its prompt")
    axes.set(ylabel="tokens of a response")
    axes.set_ylim(bottom=0)
    _rounds_axis(report, axes)
    _legend(axes)


def _kl(report: Report, axes: Any) -> None:
    start = 0
    for data in report.rounds:
        if data.kl:
            axes.plot(range(start + 1, start + len(data.kl) + 1), data.kl, "o-", ms=3, lw=1.2, color=POLICY)
            axes.axvline(start + 0.5, color=RANDOM, lw=0.8)
            axes.text(
                start + 0.7, 0.98, f"round {data.number}", transform=axes.get_xaxis_transform(), fontsize=8, va="top"
            )
            start += len(data.kl)
    axes.set(xlabel="optimizer step", ylabel="reverse KL per token (nats)", xlim=(0.5, start + 0.5))
    axes.set_ylim(bottom=0)


def _time(report: Report, axes: Any) -> None:
    left = dict.fromkeys((data.number for data in report.rounds), 0.0)
    for stage, color in STAGES.items():
        widths = [data.seconds.get(stage, 0.0) for data in report.rounds]
        axes.barh(list(left), widths, left=list(left.values()), color=color, label=stage.replace("_", " "), height=0.6)
        left = {number: left[number] + width for number, width in zip(left, widths, strict=True)}
    axes.set(xlabel="seconds", yticks=list(left), yticklabels=[f"round {number}" for number in left])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    _legend(axes, columns=len(STAGES))


def _policy_line(report: Report, value: Callable[[Score], float]) -> tuple[list[int], list[float]]:
    return [number for number, _ in report.evaluated], [value(score) for _, score in report.evaluated]


def _points(axes: Any, points: list[tuple[Any, Any]], color: str, marker: str, label: str) -> None:
    if points:
        places, scores = zip(*points, strict=True)
        rates, errors = [x.pass_rate for x in scores], [Z * x.pass_rate_se for x in scores]
        axes.errorbar(places, rates, yerr=errors, fmt=marker, color=color, capsize=3, label=label, zorder=3)


def _rounds_axis(report: Report, axes: Any) -> None:
    numbers = [data.number for data in report.rounds]
    axes.set(xticks=numbers, xlim=(-0.3, max(numbers, default=0) + 0.3))
    axes.set_xticklabels(["before" if number == 0 else f"after round {number}" for number in numbers])
    axes.grid(visible=False, axis="x")


def _legend(axes: Any, columns: int = 2) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, fontsize=8, columnspacing=1.2, borderaxespad=0.2
    )


def _any_in(report: Report, part: Callable[[RoundData], Any]) -> bool:
    return any(part(data) for data in report.rounds)


_FIGURES: list[tuple[str, str, str, Callable[[Report], bool], Callable[[Report, Any], None]]] = [
    (
        "pass_rate",
        "Pass rate",
        "On held-out games, with 95 % intervals clustered by map. Between two rounds: what the policy before reaches "
        "with that round's knowledge in its prompt; consolidation has to bring the bare policy there. (Figure 4 of the "
        "paper.)",
        lambda report: bool(report.evaluated),
        _pass_rate,
    ),
    (
        "tokens",
        "Length of responses",
        "Tokens per turn on held-out games, thinking included. (Figure 5 of the paper.)",
        lambda report: bool(report.evaluated),
        _tokens,
    ),
    (
        "reverse_kl",
        "Reverse KL",
        "Of the student to the teacher that reads the knowledge, on responses that the student has just written.",
        lambda report: _any_in(report, lambda data: data.kl),
        _kl,
    ),
    (
        "time",
        "Wall time",
        "Seconds that each stage took.",
        lambda report: _any_in(report, lambda data: data.seconds),
        _time,
    ),
]
