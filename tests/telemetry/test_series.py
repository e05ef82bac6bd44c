"""Every metric is well named, is drawn somewhere, and nothing is drawn that does not exist."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oel_ray.telemetry import series as module
from oel_ray.telemetry.series import Series, Spec

DASHBOARD = Path(__file__).parents[2] / "cluster/grafana/oel.json"
ENDS = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_bucket", "_sum", "_count"]}


def exported(kind: str, name: str) -> list[str]:
    """The names under which Prometheus finds a metric of Ray's."""
    return [f"ray_{name.removesuffix('_total') if kind == 'Counter' else name}{end}" for end in ENDS[kind]]


def of_vllm() -> Iterator[str]:
    """Those of the installed vLLM, by what its stat logger declares. Its Ray logger writes `_` for `:`."""
    spec = importlib.util.find_spec("vllm")
    assert spec and spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "v1/metrics/loggers.py").read_text()
    for kind, name in re.findall(r'self\._(gauge|counter|histogram)_cls\(\s*name="(vllm:\w+)"', source):
        yield from exported(kind.capitalize(), name.replace(":", "_"))


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def queried(panel: dict[str, Any]) -> set[str]:
    return {name for target in panel["targets"] for name in re.findall(r"\bray_\w+", target["expr"])}


def test_metric_names_are_unique_and_valid_for_prometheus_and_ray() -> None:
    names = [series.value.name for series in Series]
    assert len(set(names)) == len(names)
    assert [name for name in names if not re.fullmatch(r"oel_[a-z]+(_[a-z]+)*", name) or name.endswith("_total")] == []


def test_every_metric_has_a_unit_and_no_tag_that_ray_adds_itself() -> None:
    for spec in (series.value for series in Series):
        assert spec.kind in ENDS and spec.unit and spec.tells, spec
        assert not set(spec.tags) & {"run", "round", "stage", "episode"}, spec
    in_seconds = [spec.unit for spec in (series.value for series in Series) if "_seconds" in spec.name]
    assert set(in_seconds) == {"s"}


def test_no_metric_is_named_outside_its_declaration() -> None:
    sources = {file: file.read_text() for file in Path(module.__file__).parents[1].rglob("*.py")}
    del sources[Path(module.__file__)]
    names = "|".join(series.value.name for series in Series)
    assert [file.name for file, text in sources.items() if re.search(rf"\b({names})\b", text)] == []


def test_every_panel_asks_for_metrics_that_exist() -> None:
    ours = {name for series in Series for name in exported(series.value.kind, series.value.name)}
    known = ours | set(of_vllm())
    unknown = {panel["title"]: queried(panel) - known for panel in panels()}
    assert {title: names for title, names in unknown.items() if names} == {}
    assert [panel["title"] for panel in panels() if not queried(panel)] == []


def test_every_metric_is_in_a_panel() -> None:
    asked = set().union(*map(queried, panels()))
    absent = [s.value.name for s in Series if not asked & set(exported(s.value.kind, s.value.name))]
    assert absent == []


def test_panels_group_by_tags_that_their_metrics_have() -> None:
    tags = {"ray_" + s.value.name: {"run", "round", "stage", *s.value.tags, "le"} for s in Series}
    for panel in panels():
        for target in panel["targets"]:
            names = [
                re.sub(r"_(total|bucket|sum|count)$", "", name) for name in re.findall(r"\bray_\w+", target["expr"])
            ]
            if any(name.startswith("ray_vllm") for name in names):
                continue
            asked = {tag.strip() for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for tag in by.split(",")}
            assert all(asked <= tags[name] for name in names), (panel["title"], target["expr"])
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= asked, panel["title"]


@pytest.mark.parametrize("series", [Series.TURNS, Series.STAGE_ETA, Series.TURN_LATENCY])
def test_reporting_a_metric_without_ray_does_nothing(series: Series) -> None:
    module.enter(1, "collect")
    module.report(series, 3)
    module.report(series, None)


@pytest.mark.process
def test_declaring_metrics_needs_no_ray() -> None:
    code = "import sys, oel_ray.telemetry.series, oel_ray.telemetry.progress; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_log_records_carry_the_round_and_stage_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    module.enter(2, "extract")
    with caplog.at_level("INFO", "oel_ray"):
        module.log.info("so it is")
    (record,) = caplog.records
    assert (record.getMessage(), record.__dict__["round"], record.__dict__["stage"]) == ("so it is", "2", "extract")


def test_names_of_exported_metrics_have_the_prefix_and_suffixes_that_ray_adds() -> None:
    assert exported("Counter", "vllm_generation_tokens") == ["ray_vllm_generation_tokens_total"]
    assert exported(*Spec("oel_turn", "Histogram", "s", "")[1::-1]) == [
        f"ray_oel_turn{end}" for end in ENDS["Histogram"]
    ]


@pytest.mark.process
def test_ray_is_set_to_print_repeated_lines_before_it_is_imported() -> None:
    code = "import oel_ray, os, sys; sys.exit('ray' in sys.modules or os.environ['RAY_DEDUP_LOGS'] != '0')"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_DEDUP_LOGS"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
