"""A Ray cluster as a person starts one, for tests: `ray start` a node, with a job server and token authentication.

All nodes are on this machine, each with what it offers. A node is ended by process ids.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

BIN = Path(sys.executable).parent
START_S = 120.0
HEAD = ("--head", "--num-cpus=0", "--dashboard-host=127.0.0.1")


class Node:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """As a person would, who waits for a while."""
        if self._process.poll() is None:
            below = psutil.Process(self._process.pid).children(recursive=True)
            self._process.terminate()
            psutil.wait_procs([psutil.Process(self._process.pid), *below], timeout=20)
            self._kill(below)

    def kill(self) -> None:
        """All of it at once."""
        self._kill(psutil.Process(self._process.pid).children(recursive=True))

    def _kill(self, below: list[psutil.Process]) -> None:
        for process in below:
            if process.is_running():
                process.kill()
        self._process.kill()
        self._process.wait(30)


class Cluster:
    """A head without CPUs, whose dashboard takes jobs, and the nodes that were added to it."""

    def __init__(self) -> None:
        # Not pytest's own folder: the paths of Ray's sockets may have 107 characters.
        self._temporary = tempfile.TemporaryDirectory(prefix="oel-", ignore_cleanup_errors=True)
        self._folder = Path(self._temporary.name)
        self._port, dashboard, self.metrics_port = free_ports(3)
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "RAY_TMPDIR": self._temporary.name,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_metrics_report_interval_ms": "1000",
            "RAY_process_group_cleanup_enabled": "true",
        }
        self.scraped = self._folder / "ray" / "prom_metrics_service_discovery.json"
        """Where the head says what offers metrics, for Prometheus."""
        self._nodes: list[Node] = []

    def __enter__(self) -> Self:
        port, dashboard = f"--port={self._port}", f"--dashboard-port={self.dashboard.rpartition(':')[2]}"
        self._start("head", *HEAD, port, dashboard, f"--metrics-export-port={self.metrics_port}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for node in reversed(self._nodes):
            node.stop()
        self._temporary.cleanup()

    def add(self, name: str, cpus: int, **resources: float) -> Node:
        address = f"--address=127.0.0.1:{self._port}"
        return self._start(name, address, f"--num-cpus={cpus}", f"--resources={json.dumps(resources)}")

    def run(self, *command: str, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
        """A command of somebody who has the cluster's token."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def _start(self, name: str, *arguments: str) -> Node:
        log = self._folder / f"{name}.log"
        several = ("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0")
        command = [str(BIN / "ray"), "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--object-store-memory=200000000", *several, *arguments],
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._nodes.append(Node(process))
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in (told := log.read_text(errors="replace")):
            assert process.poll() is None and time.monotonic() < deadline, told
            time.sleep(0.2)
        return self._nodes[-1]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]
    finally:
        for free in sockets:
            free.close()
