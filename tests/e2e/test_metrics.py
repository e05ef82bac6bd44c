"""A small run, watched from outside: what Prometheus would find while it works, and what it leaves in its folder."""

import importlib.util
import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import oel_ray.cluster.session  # noqa: F401 - sets what Ray reads when it is imported

import ray  # isort: skip

from oel_ray import loop
from oel_ray.config.load import load_config
from oel_ray.runs.folder import RunFolder
from oel_ray.telemetry.progress import Progress
from oel_ray.telemetry.series import Series
from tests.e2e.test_run import SMALL
from tests.support.tiny_models import save_tiny_model
from tests.telemetry.test_series import exported
from tests.telemetry.test_trackers import written

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NEVER = {Series.ENGINE_RESTARTS, Series.REQUESTS_MOVED, Series.SKIPPED_STEPS}
"""What does not happen in a run where nothing goes wrong."""
SAMPLE = re.compile(r"^(ray_(?:oel|vllm)_\w+)(?:{(.*)})? (\S+)$", re.MULTILINE)


class Scraper(threading.Thread):
    """Asks every node for its metrics, as Prometheus does. `seen` has all label sets of a name, with the last value."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: dict[str, dict[str, float]] = {}
        self.logs = Path()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            if not ray.is_initialized():
                continue
            with suppress(Exception):  # it ends between two lines
                node = ray.nodes()[0]
                self.logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
                address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
                with urllib.request.urlopen(address, timeout=5) as answer:
                    for name, labels, value in SAMPLE.findall(answer.read().decode()):
                        self.seen.setdefault(name, {})[labels] = float(value)


@contextmanager
def scraped() -> Iterator[Scraper]:
    scraper = Scraper()
    scraper.start()
    try:
        yield scraper
    finally:
        scraper.ended.set()
        scraper.join()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scraper, RunFolder]]:
    model = save_tiny_model(tmp_path_factory.mktemp("model"))
    settings = ["cluster.logs=json", "consolidate.profile_steps=[1]", f"model={model}"]
    config = load_config("exact", [*SMALL, *settings])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        patch.setenv("OEL_RAY_HANG_FOLDER", "")  # `loop.work` sets it, and it is not to outlive this
        with scraped() as scraper, RunFolder.create(tmp_path_factory.mktemp("runs") / "run", config) as folder:
            loop.run(config, folder, Progress(folder))
        yield scraper, folder


def labels_of(scraper: Scraper, series: Series) -> list[dict[str, str]]:
    names = exported(series.value.kind, series.value.name)
    return [dict(re.findall(r'(\w+)="([^"]*)"', labels)) for name in names for labels in scraper.seen.get(name, ())]


def test_every_series_has_data_with_its_tags(run: tuple[Scraper, RunFolder]) -> None:
    scraper, folder = run
    absent = [series.value.name for series in Series if series not in NEVER and not labels_of(scraper, series)]
    assert absent == [], sorted(scraper.seen)
    for series in set(Series) - NEVER:
        for labels in labels_of(scraper, series):
            assert labels["run"] == folder.run_id, series
            assert set(series.value.tags) <= labels.keys(), series


def test_counters_agree_with_the_metrics_of_the_run(run: tuple[Scraper, RunFolder]) -> None:
    scraper, folder = run
    rows = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    collected = next(row for row in rows if row["stage"] == "collect")

    def counted(name: str) -> float:
        return sum(value for labels, value in scraper.seen[name].items() if 'stage="collect"' in labels)

    assert counted("ray_oel_episodes_total") == collected["extraction"] + collected["consolidation"]
    # The row is made when the last game has ended, and what its client says of its last request may come later.
    assert 0 <= counted("ray_oel_requests_total") - collected["requests"] <= 2
    assert counted("ray_oel_generated_tokens_total") >= collected["response_tokens"] > 0
    assert set(scraper.seen["ray_oel_engine_healthy"].values()) <= {0.0, 1.0}


@pytest.mark.skipif(importlib.util.find_spec("grpc_reflection") is None, reason="needs ray[serve]")
def test_the_metrics_of_vllm_are_exported_with_the_name_of_the_engine(run: tuple[Scraper, RunFolder]) -> None:
    scraper, _ = run
    for name in ("ray_vllm_num_requests_running", "ray_vllm_generation_tokens_total"):
        assert any('model_name="engine-0"' in labels for labels in scraper.seen[name])


def test_tensorboard_holds_the_scalars_of_every_stage(run: tuple[Scraper, RunFolder]) -> None:
    _, folder = run
    scalars = written(folder.path / "tensorboard")
    assert [step for step, _ in scalars["training/kl_per_token"]] == [0, 1]
    assert {"collect/wall_s", "evaluate/pass_rate", "consolidate/requests"} <= scalars.keys()


def test_the_chosen_step_is_profiled(run: tuple[Scraper, RunFolder]) -> None:
    _, folder = run
    (trace,) = (folder.path / "profile").iterdir()
    assert trace.name.startswith("round-001-step-0001") and json.loads(trace.read_text())["traceEvents"]


def test_actors_write_records_with_run_round_stage_and_actor(run: tuple[Scraper, RunFolder]) -> None:
    scraper, folder = run
    files = [*scraper.logs.glob("worker-*.err"), *scraper.logs.glob("train/*.log")]  # Ray Train's ranks have their own
    lines = [line for file in files for line in file.read_text().splitlines()]
    records: list[dict[str, Any]] = [json.loads(line) for line in lines if line.startswith("{")]
    ours = [record for record in records if record.get("run") == folder.run_id]
    assert {"1"} == {record["round"] for record in ours}
    assert {"extract", "consolidate"} <= {record["stage"] for record in ours}
    assert "extractor-1-0" in {record.get("actor_name") for record in ours}


def test_a_healthy_run_writes_no_stacks_of_hung_actors(run: tuple[Scraper, RunFolder]) -> None:
    assert not (run[1].path / "hang").exists()
