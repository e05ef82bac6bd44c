"""A run as a job of a cluster: a head without CPUs, and a node each for players, engines and trainer."""

import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import orjson
import pytest

from oel_ray.runs.folder import RunFolder
from tests.support.machines import BIN, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

POOLS = {
    "player": "collector",
    "engine-0": "engine",
    "engine-1": "engine",
    "extractor": "collector",
    "RayTrainWorker": "trainer",
}
SMALL = [
    "rounds=1",
    "collect.seats=4",
    "collect.players=1",
    "collect.max_players=2",
    "collect.resources={collector: 1}",
    "extract.resources={collector: 1}",
    "extract.seeds=2",
    "engines.resources={engine: 1}",
    "consolidate.resources={trainer: 1}",
    "consolidate.steps=2",
    "evaluate.maps=4",
    "evaluate.seeds=1",
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        cluster.add("engines", 2, engine=2)
        cluster.add("trainer", 3, trainer=2)  # Ray Train's controller takes a CPU, too
        yield cluster


def command(cluster: Cluster, run: Path, *settings: str) -> list[str]:
    """`oel submit`, which prints what the job prints and ends with its exit code. `run`: the folder."""
    where = ("--name", run.name, "--runs", str(run.parent), "--address", cluster.dashboard)
    return [str(BIN / "oel"), "submit", "quickstart", *SMALL, *settings, *where]


@contextmanager
def submitted(cluster: Cluster, run: Path, *settings: str) -> Iterator["subprocess.Popen[str]"]:
    """A job that is followed until it ends; it ends here at the latest."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command(cluster, run, *settings), env=cluster.environment, **pipes) as job:
        try:
            yield job
        finally:
            job.kill()


def assert_verified(cluster: Cluster, run: Path) -> None:
    verified = cluster.run(str(BIN / "oel"), "verify", str(run), "--replay")
    assert verified.returncode == 0, verified.stdout


def played(run: Path) -> list[bytes]:
    """The games of the stage that collects, as long as it is under way."""
    return [line for path in run.rglob("*collect*/games.jsonl") for line in path.read_bytes().splitlines(True)]


def wait_for(what: Callable[[], bool], job: "subprocess.Popen[str]", timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def actors(cluster: Cluster) -> dict[str, str]:
    """The nodes of all actors that live, by name, or by class where they have none."""
    question = ("actors", "--filter", "state=ALIVE", "--format", "json", "--limit", "1000")
    told = cluster.run(str(BIN / "ray"), "list", *question, "--address", cluster.dashboard)
    found = orjson.loads(told.stdout) if told.returncode == 0 else []
    return {actor["name"] or actor["class_name"]: actor["node_id"] for actor in found or []}


class Watch(threading.Thread):
    """Asks again and again who is where."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.seen: dict[str, set[str]] = defaultdict(set)
        self._cluster = cluster
        self._over = threading.Event()

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(5):
            for actor, node in actors(self._cluster).items():
                self.seen[actor].add(node)


def test_players_engines_and_trainer_run_on_nodes_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    with cluster.add("collector", 3, collector=2), Watch(cluster) as watch:
        done = cluster.run(*command(cluster, tmp_path / "apart"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_verified(cluster, tmp_path / "apart")
    nodes = {pool: set[str]() for pool in POOLS.values()}
    for actor, where in watch.seen.items():
        for begins, pool in POOLS.items():
            if actor.startswith(begins):
                nodes[pool] |= where
    assert {pool: len(where) for pool, where in nodes.items()} == dict.fromkeys(nodes, 1), watch.seen
    assert len(set.union(*nodes.values())) == 3


def test_a_collector_that_joins_takes_games_and_one_that_is_killed_loses_none(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "joined"
    few = ("collect.seats=1", "collect.max_players=4")  # at a time, so that there is time to add a node
    many = ("collect.extraction_games=100", "extract.seeds=1", "evaluate.enabled=false")
    with (
        cluster.add("old", 3, collector=2) as old,
        Watch(cluster) as watch,
        submitted(cluster, run, *few, *many) as job,
    ):
        wait_for(lambda: len(played(run)) >= 4, job)
        with cluster.add("new", 3, collector=2):
            wait_for(lambda: len({*chain(*(watch.seen[f"player-{n}"] for n in range(4)))}) == 2, job)
            before = len(played(run))
            old.kill()
            output, _ = job.communicate(timeout=900)
    assert job.returncode == 0, output
    assert 4 <= before < 100, "the new node had hardly a game left to play"
    assert_verified(cluster, run)


def test_a_job_that_is_stopped_goes_on_when_it_is_submitted_again(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    with cluster.add("collector", 3, collector=2):
        with submitted(cluster, run) as job:
            wait_for(lambda: len(played(run)) >= 4, job)
            stopped = cluster.run(str(BIN / "ray"), "job", "stop", "oel-stopped-1", "--address", cluster.dashboard)
            assert stopped.returncode == 0, stopped.stdout + stopped.stderr
            output, _ = job.communicate(timeout=120)
        assert job.returncode == 130, output
        kept, began = played(run), RunFolder(run).run_id
        assert len(kept) >= 4
        again = cluster.run(*command(cluster, run))
    assert again.returncode == 0, again.stdout + again.stderr
    assert RunFolder(run).run_id == began
    files = run.rglob("trajectories/*.jsonl")
    assert {*kept} <= {line for file in files for line in file.read_bytes().splitlines(True)}
    assert_verified(cluster, run)
