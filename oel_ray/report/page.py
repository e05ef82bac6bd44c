"""Writes the report: one HTML file without references to anything outside it, and a PNG per figure. Any process."""

from pathlib import Path
from typing import Any

from oel_ray.evaluate.metrics import Score
from oel_ray.report.data import Report, interval, read_report
from oel_ray.report.figures import Figure, figures

PAGE = "report.html"


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run into `out` (the run's own `report` folder); returns the page.

    Raises:
        UserError: no run lies at `run`.
    """
    report = read_report(run)
    drawn = figures(report)
    target = out or run / "report"
    target.mkdir(parents=True, exist_ok=True)
    for figure in drawn:
        (target / f"{figure.name}.png").write_bytes(figure.png)
    page = target / PAGE
    page.write_text(render(report, drawn), encoding="utf-8")
    return page


def render(report: Report, drawn: list[Figure]) -> str:
    """The page. Whatever games and models wrote is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("oel_ray.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"rate": _rate, "interval": _interval, "clock": _clock}
    return environment.get_template("page.html.j2").render(report=report, figures=drawn)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _interval(value: Score | None) -> str:
    return "-" if value is None else interval(value)


def _clock(seconds: Any) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
