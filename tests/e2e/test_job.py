"""A run as a job of a real Ray cluster, with its job server and token authentication."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import requests
import yaml

from oel_ray.runs.folder import RunFolder
from oel_ray.views.verify import verify
from tests.e2e.test_run import SMALL
from tests.support.tiny_models import save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]
BIN = Path(sys.executable).parent
TOKEN = "c0ffee" * 8


class Cluster(NamedTuple):
    address: str
    environment: dict[str, str]

    def call(self, *command: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """`oel` or `ray` as a person would type it."""
        environment = self.environment | changes
        return subprocess.run(
            [BIN / command[0], *command[1:]], env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    def jobs(self) -> dict[str, dict[str, Any]]:
        """What the job server tells of each job, by its id."""
        answer = requests.get(f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10)
        return {job["submission_id"]: job for job in answer.json() if job["submission_id"]}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    ports = {
        name: free_port()
        for name in (
            "port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port",
            "node-manager-port", "object-manager-port", "runtime-env-agent-port",
        )
    }  # fmt: skip
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    # Not pytest's own folder: the paths of Ray's sockets may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="oel-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "token").write_text(TOKEN)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": f"{folder}/token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_API_SERVER_ADDRESS": address,
            "HF_TOKEN": "hf_canary",
        }
        start = ["ray", "start", "--head", "--block", "--num-cpus=8", "--dashboard-host=127.0.0.1"]
        start.append("--object-store-memory=200000000")
        ray = subprocess.Popen(
            [BIN / start[0], *start[1:], *(f"--{name}={port}" for name, port in ports.items())],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        found = Cluster(address, environment)
        try:
            for _ in range(120):
                try:
                    found.jobs()
                    break
                except (requests.RequestException, ValueError):
                    time.sleep(1)
            yield found
        finally:
            started = psutil.Process(ray.pid).children(recursive=True)
            ray.terminate()
            _, alive = psutil.wait_procs(started, timeout=20)
            for process in alive:
                process.kill()
            ray.wait(20)


@pytest.fixture(scope="module")
def game(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    model = save_tiny_model(tmp_path_factory.mktemp("model"))
    (folder / "game.yaml").write_text(yaml.safe_dump({"base": "exact", "model": str(model)}))
    return folder / "game.yaml"


def test_a_job_killed_and_submitted_again_goes_on(cluster: Cluster, game: Path, tmp_path: Path) -> None:
    submit = ["oel", "submit", str(game), *SMALL, "--name", "first", "--runs", str(tmp_path)]
    killed = cluster.call(*submit, OEL_RAY_KILL_AFTER="0:prepare")
    assert killed.returncode == 128 + signal.SIGKILL, killed.stderr
    assert "oel: the job oel-first-1 ended with exit code 137" in killed.stderr
    began = RunFolder(tmp_path / "first")
    assert set(began.committed[0]) == {"prepare"}

    finished = cluster.call(*submit, HF_HUB_OFFLINE="1")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "reverse KL" in finished.stdout
    assert RunFolder(tmp_path / "first").run_id == began.run_id
    assert verify(tmp_path / "first") == []

    done = (tmp_path / "first" / "metrics.jsonl").read_bytes()
    by_hand = cluster.call(
        "ray", "job", "submit", "--submission-id", "mine", "--working-dir", str(game.parent), "--",
        "oel", "run", "game.yaml", *SMALL, "--run-dir", str(tmp_path / "first"), "--resume",
    )  # fmt: skip
    assert by_hand.returncode == 0, by_hand.stdout
    assert (tmp_path / "first" / "metrics.jsonl").read_bytes() == done, "a finished run did something again"

    jobs = cluster.jobs()
    assert {name: job["status"] for name, job in jobs.items()} == {
        "oel-first-1": "FAILED",
        "oel-first-2": "SUCCEEDED",
        "mine": "SUCCEEDED",
    }
    assert jobs["oel-first-2"]["metadata"].items() >= {"run": "first", "run_dir": str(tmp_path / "first")}.items()
    assert "canary" not in str(jobs)


def test_ctrl_c_stops_following_and_leaves_the_job_running(cluster: Cluster, game: Path, tmp_path: Path) -> None:
    submit = ["oel", "submit", str(game), *SMALL, "--name", "second", "--runs", str(tmp_path)]
    with subprocess.Popen(
        [BIN / submit[0], *submit[1:]],
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as following:
        assert following.stdout
        assert any("stages in rounds 0 to 1" in line for line in following.stdout)
        following.send_signal(signal.SIGINT)
        _, errors = following.communicate(timeout=30)
    assert following.returncode == 130
    it = f"oel-second-1 --address {cluster.address}"
    goes_on = f"follow it with 'ray job logs -f {it}', stop it with 'ray job stop {it}'"
    assert errors.endswith(f"oel: the job oel-second-1 goes on: {goes_on}\n")
    assert cluster.jobs()["oel-second-1"]["status"] == "RUNNING"

    again = cluster.call(*submit)
    assert (again.returncode, again.stdout) == (2, "")
    assert "the run second is under way as job oel-second-1" in again.stderr

    stopped = cluster.call("ray", "job", "stop", "oel-second-1")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert cluster.jobs()["oel-second-1"]["status"] == "STOPPED"
    assert not (tmp_path / "second" / "lock.json").exists(), "it was killed before it could end"


@pytest.mark.parametrize("changes", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "f00d" * 12}])
def test_a_job_without_the_token_is_refused_in_one_line(cluster: Cluster, changes: dict[str, str]) -> None:
    refused = cluster.call("oel", "submit", "quickstart", "--name", "third", **changes)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.count("\n") == 1, refused.stderr
    assert "takes no job from here (AuthenticationError" in refused.stderr
    assert "export RAY_AUTH_MODE=token" in refused.stderr
