"""A run's demand and the doctor, on a real cluster of several raylets."""

import os
import signal
import time
from pathlib import Path

import pytest

from oel_ray.cluster import doctor
from oel_ray.cluster.session import check_resources
from oel_ray.config.load import load_config
from oel_ray.errors import UserError
from tests.support.raylets import raylets

pytestmark = pytest.mark.slow


def test_a_demand_that_no_node_meets_is_refused_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with raylets({"num_cpus": 4, "num_gpus": 1}, {"num_cpus": 4, "num_gpus": 1}, connect=False) as cluster:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        began = time.monotonic()
        one_too_many = ["engines.device=auto", "engines.count=2", "consolidate.workers=1"]
        with pytest.raises(UserError, match=r"needs 3 GPUs and the cluster at .* has 2: add 1, or lower"):
            check_resources(load_config("quickstart", one_too_many))
        own = ["collect.resources={collector: 1}", "engines.count=1", "collect.players=2"]
        with pytest.raises(UserError, match=r"needs 2 collectors and .* has 0: add 2.*supply: 1 x \(0 CPU"):
            check_resources(load_config("quickstart", own))
        assert time.monotonic() - began < 60
        check_resources(load_config("quickstart", ["engines.device=cpu"]))


def test_the_doctor_asks_every_node_and_tells_of_one_that_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("quickstart")
    with raylets({"num_cpus": 4}, {"num_cpus": 4}, connect=False) as cluster:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        assert [finding for finding in doctor.examine(config, tmp_path, print) if finding.is_error] == []
        monkeypatch.setattr(doctor, "ANSWER_S", 20.0)
        silent = min(cluster.worker_nodes, key=lambda node: node.node_id)
        pid = silent.all_processes["raylet"][0].process.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            found = [finding for finding in doctor.examine(config, tmp_path, print) if finding.is_error]
        finally:
            os.kill(pid, signal.SIGCONT)
    assert [finding.where for finding in found if "gave no answer" in finding.what] == [silent.node_id[:12]]
    assert list(tmp_path.iterdir()) == []
