"""The report's figures, each as SVG for the page and as PNG beside it. Any process; needs matplotlib."""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from oel_ray.play.scores import Score
from oel_ray.views.report.data import Report, Z, when

POLICY, CONTEXT, RANDOM, ORACLE = "#1f6f8b", "#d9822b", "#9a9a9a", "#5a8f4e"
STAGES = {
    "collect": "#7fb3c8",
    "extract": "#d9822b",
    "evaluate_in_context": "#f0c08a",
    "consolidate": "#1f6f8b",
    "evaluate": "#b8c9a9",
}
UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
_WHOLE, _HALF = (8.6, 4.0), (5.4, 3.6)
"""Inches of a wide figure, and of one that shares a row with another."""
_SPELLED = 6
"""Up to so many policies have their names in words below an axis."""


class Figure(NamedTuple):
    """How a figure is made, and whether the run has anything to show in it; the page has its title and caption.

    A `wide` one takes a row of the page for itself.
    """

    name: str
    has_data: Callable[[Report], bool]
    draw: Callable[[Report, Any], None]
    wide: bool = False


def figures(report: Report) -> list[tuple[Figure, str, bytes]]:
    """The figures that the run has data for, as SVG and as PNG."""
    drawn = []
    for figure in _FIGURES:
        if figure.has_data(report):
            with canvas_and_axes(wide=figure.wide) as (canvas, axes):
                figure.draw(report, axes)
                drawn.append((figure, *_rendered(canvas)))
    return drawn


@contextmanager
def canvas_and_axes(*, wide: bool) -> Iterator[tuple[Any, Any]]:
    """What a figure is drawn on; rendered within the context it has the look of all others."""
    from matplotlib import style
    from matplotlib.figure import Figure as Canvas

    # Not over whatever matplotlibrc the machine has.
    with style.context(Path(__file__).with_suffix(".mplstyle"), after_reset=True):
        canvas = Canvas(figsize=_WHOLE if wide else _HALF, layout="constrained")
        yield canvas, canvas.add_subplot()


def _rendered(canvas: Any) -> tuple[str, bytes]:
    svg, png = io.StringIO(), io.BytesIO()
    canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    canvas.savefig(png, format="png", dpi=160, metadata={"Software": None})
    text = svg.getvalue()
    return text[text.index("<svg") :], png.getvalue()


def _pass_rate(report: Report, axes: Any) -> None:
    """Figure 4 of the paper: up a round's accumulation, then the policy that it was distilled into."""
    _curves(report, axes, lambda value: value.pass_rate, lambda value: Z * value.pass_rate_se)
    for name, label, color in (("random", "random player", RANDOM), ("oracle", "perfect player", ORACLE)):
        rates = [rate for _, value in report.evaluated if (rate := getattr(value, name)) is not None]
        if rates:
            axes.axhline(rates[-1], color=color, lw=1.4, ls=(0, (5, 3)), label=label, zorder=1)
    axes.set(ylim=(-0.02, 1.04), ylabel="pass rate (games won)")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    _legend(axes)


def _tokens(report: Report, axes: Any) -> None:
    """Figure 5 of the paper, with the accumulations' steps."""
    _curves(report, axes, lambda value: value.response_tokens_per_turn)
    axes.set(ylabel="response tokens per turn", ylim=(0, None))
    _legend(axes, columns=1)


def _curves(
    report: Report, axes: Any, value: Callable[[Score], float], error: Callable[[Score], float] | None = None
) -> None:
    """The bare policies at whole numbers; between two of them knowledge grows in the prompt of the first."""

    def draw(points: Mapping[float, Score], color: str, marker: str, label: str) -> None:
        errors = [error(score) for score in points.values()] if error else None
        rates = [value(score) for score in points.values()]
        axes.errorbar(list(points), rates, yerr=errors, fmt=marker, color=color, ms=5, capsize=2.5, lw=1.2, label=label)

    bare = {float(number): score for number, score in report.evaluated}
    axes.plot(list(bare), [value(score) for score in bare.values()], color=POLICY, lw=1.4, zorder=2)
    draw(bare, POLICY, "o", "bare policy")
    grown: dict[float, Score] = {}
    for data in report.rounds:
        start = data.number - 1
        places = [start + (index + 1) / (len(data.in_context) + 1) for index in range(len(data.in_context))]
        climb = dict(zip(places, data.in_context.values(), strict=True))
        from_bare = {float(start): bare[data.began_with], **climb} if data.began_with in bare else climb
        axes.plot(list(from_bare), [value(score) for score in from_bare.values()], color=CONTEXT, lw=1.2, ls=":")
        grown |= climb
    if grown:
        draw(grown, CONTEXT, "D", "the same policy with knowledge in its prompt, from so many games")
    steps = [str(step or "all") for data in report.rounds for step in data.in_context]
    axes.set_xticks(list(grown), steps, minor=True)
    axes.tick_params(axis="x", which="minor", labelsize=7.5, labelcolor=CONTEXT, color=CONTEXT, length=3, pad=2)
    _rounds_axis(report, axes, below=bool(grown))


def _kl(report: Report, axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    start = 0
    for data in report.rounds:
        if data.kl:
            end = start + len(data.kl)
            axes.plot(range(start + 1, end + 1), data.kl, "o-", ms=3, lw=1.4, color=POLICY)
            if start:
                axes.axvline(start + 0.5, color=RANDOM, lw=0.8)
            middle = (start + end + 1) / 2
            place = axes.get_xaxis_transform()
            axes.text(middle, 1.02, f"round {data.number}", transform=place, fontsize=8.5, ha="center", va="bottom")
            start = end
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="optimizer step, over all rounds", ylabel="reverse KL (nats per token)", xlim=(0.5, start + 0.5))
    axes.set_ylim(bottom=min(kl for data in report.rounds for kl in [0.0, *data.kl] if kl is not None))


def _time(report: Report, axes: Any) -> None:
    longest = max(sum(data.seconds.get(stage, 0.0) for stage in STAGES) for data in report.rounds)
    unit, seconds = next(pair for pair in UNITS if longest >= 3 * pair[1] or pair[1] == 1)
    left = dict.fromkeys((data.number for data in report.rounds), 0.0)
    for stage, color in STAGES.items():
        widths = [data.seconds.get(stage, 0.0) / seconds for data in report.rounds]
        axes.barh(list(left), widths, left=list(left.values()), color=color, label=stage.replace("_", " "), height=0.6)
        left = {number: left[number] + width for number, width in zip(left, widths, strict=True)}
    names = [f"round {number}" if number else "before" for number in left]
    axes.set(xlabel=f"wall time ({unit})", yticks=list(left), yticklabels=names)
    axes.figure.set_figheight(1.2 + 0.4 * len(left))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    _legend(axes, columns=len(STAGES))


def _rounds_axis(report: Report, axes: Any, *, below: bool) -> None:
    """A tick for every policy; `below` leaves room for the accumulations' steps."""
    numbers = [data.number for data in report.rounds]
    spelled = len(numbers) <= _SPELLED
    names = [when(number) if spelled else str(number) for number in numbers]
    axes.set_xticks(numbers, names)
    axes.tick_params(axis="x", which="major", pad=13 if below else 4)
    axes.set(xlim=(-0.3, max(numbers) + 0.3), xlabel="" if spelled else "after round")
    axes.grid(visible=False, axis="x")


def _legend(axes: Any, columns: int = 2) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, fontsize=8, columnspacing=1.2, borderaxespad=0.2
    )


_FIGURES = [
    Figure("pass_rate", lambda report: bool(report.evaluated), _pass_rate, wide=True),
    Figure("tokens", lambda report: bool(report.evaluated), _tokens),
    Figure("reverse_kl", lambda report: any(data.kl for data in report.rounds), _kl),
    Figure("time", lambda report: any(STAGES.keys() & data.seconds.keys() for data in report.rounds), _time, wide=True),
]
