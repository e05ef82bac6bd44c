"""Writes the report: one HTML file without references to anything outside it, and a PNG per figure. Any process."""

from pathlib import Path

from oel_ray.errors import UserError
from oel_ray.formats import ABSENT, clock, digits
from oel_ray.views.report.data import Report, interval, read_report, when
from oel_ray.views.report.figures import Figure, figures

PAGE = "report.html"


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run into `out` (the run's own `report` folder); returns the page.

    Raises:
        UserError: no run lies at `run`, or `out` cannot be written to.
    """
    report = read_report(run)
    drawn = figures(report)
    target = out or run / "report"
    page = target / PAGE
    try:
        target.mkdir(parents=True, exist_ok=True)
        for figure, _, png in drawn:
            (target / f"{figure.name}.png").write_bytes(png)
        page.write_text(render(report, drawn), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {target}: {error.strerror}: choose another folder with --out") from None
    return page


def render(report: Report, drawn: list[tuple[Figure, str, bytes]]) -> str:
    """The page. Whatever games and models wrote is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("oel_ray.views.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"rate": _rate, "interval": interval, "number": digits, "clock": clock, "when": when}
    return environment.get_template("page.html.j2").render(report=report, figures=drawn, absent=ABSENT)


def _rate(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.0f} %"
