"""A Prometheus scrapes a cluster while a job runs on it, and is then asked what every panel of the dashboard asks.

Wants `prometheus` on the PATH, as Debian's package of that name installs it.
"""

import importlib.util
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests
import yaml

from tests.support.machines import BIN, Cluster, free_ports

PROMETHEUS = shutil.which("prometheus")
DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "oel.json"
SETTINGS = [
    "rounds=1",
    "collect.seats=8",
    "extract.seeds=2",
    "consolidate.steps=2",
    "evaluate.maps=8",
    "evaluate.seeds=1",
]
VARIABLES = {"$run": ".*", "$__rate_interval": "30s"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PROMETHEUS is None, reason="needs prometheus"),
]


def queries() -> list[Any]:
    """A case for each query of a panel."""
    vllm = pytest.mark.skipif(importlib.util.find_spec("grpc_reflection") is None, reason="needs ray[serve]")
    return [
        pytest.param(
            target["expr"], id=f"{panel['title']} {target['refId']}", marks=[vllm] * ("vllm" in target["expr"])
        )
        for panel in orjson.loads(DASHBOARD.read_bytes())["panels"]
        for target in panel.get("targets", [])
    ]


class Prometheus:
    """One that scrapes what the head of a cluster says is there."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        (port,) = free_ports(1)
        self._address = f"http://127.0.0.1:{port}"
        config = {
            "global": {"scrape_interval": "2s"},
            "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [str(cluster.scraped)]}]}],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        options = {"config.file": folder / "prometheus.yaml", "storage.tsdb.path": folder / "data"}
        options["web.listen-address"] = self._address.removeprefix("http://")
        command = [str(PROMETHEUS), *(f"--{name}={value}" for name, value in options.items())]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._began = time.time()

    def values(self, query: str) -> list[float]:
        """What a query gives, from the start to now."""
        span = {"query": query, "start": self._began, "end": time.time(), "step": 2}
        answer = requests.get(f"{self._address}/api/v1/query_range", params=span, timeout=30).json()
        assert answer["status"] == "success", answer
        return [float(value) for series in answer["data"]["result"] for _, value in series["values"]]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has seen a whole run."""
    runs, folder = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("prometheus")
    with Cluster() as cluster:
        cluster.add("node", 8)
        watching = Prometheus(cluster, folder)
        try:
            job = ("quickstart", *SETTINGS, "--name", "watched", "--runs", str(runs), "--address", cluster.dashboard)
            done = cluster.run(str(BIN / "oel"), "submit", *job)
            assert done.returncode == 0, done.stdout + done.stderr
            yield watching
        finally:
            watching.stop()


@pytest.mark.parametrize("query", queries())
def test_every_panel_of_the_dashboard_has_data(prometheus: Prometheus, query: str) -> None:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert any(math.isfinite(value) for value in prometheus.values(query))
