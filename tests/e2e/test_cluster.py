"""A run as a job of a cluster: a head without CPUs, and a node each for players, engines and trainer."""

import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from tests.machines import BIN, Cluster

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


def submit(cluster: Cluster, runs: Path) -> subprocess.CompletedProcess[str]:
    """`oel submit`, which prints what the job prints and ends with its exit code."""
    job = ("quickstart", *SMALL, "--name", "first", "--runs", str(runs), "--address", cluster.dashboard)
    return cluster.run(str(BIN / "oel"), "submit", *job)


def assert_verified(cluster: Cluster, runs: Path) -> None:
    verified = cluster.run(str(BIN / "oel"), "verify", str(runs / "first"), "--replay")
    assert verified.returncode == 0, verified.stdout


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
    collector = cluster.add("collector", 3, collector=2)
    with Watch(cluster) as watch:
        submitted = submit(cluster, tmp_path)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert_verified(cluster, tmp_path)
    nodes = {pool: set[str]() for pool in POOLS.values()}
    for actor, where in watch.seen.items():
        for begins, pool in POOLS.items():
            if actor.startswith(begins):
                nodes[pool] |= where
    assert {pool: len(where) for pool, where in nodes.items()} == dict.fromkeys(nodes, 1), watch.seen
    assert len(set.union(*nodes.values())) == 3
    collector.stop()
