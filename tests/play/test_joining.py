"""Players on nodes that come and go while games are played: real raylets on this machine."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from oel_ray.config.schema import CollectConfig, RunConfig
from oel_ray.play.players import Game, player_pool
from oel_ray.records import Episode, Generation, Sampling
from tests.support import shaky_games
from tests.support.installed import installed
from tests.support.raylets import raylets
from tests.support.scripted import SAMPLING, generation
from tests.support.tokenizers_for_tests import small_tokenizer

import ray  # isort: skip

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@dataclass
class Slow:
    """Takes its time, and writes down on which node it was asked."""

    log: Path

    async def __call__(self, prompt_ids: Any, sampling: Sampling, *, seed: int, key: str) -> Generation:
        import asyncio

        with self.log.open("a") as file:
            file.write(f"{ray.get_runtime_context().get_node_id()}\n")
        await asyncio.sleep(0.5)
        return generation("[go]")


@pytest.fixture
def policy(tmp_path: Path) -> Iterator[Path]:
    small_tokenizer().save_pretrained(tmp_path / "policy")
    (tmp_path / "installed").mkdir()
    (tmp_path / "marks").mkdir()
    with installed(tmp_path / "installed", {"Shaky-v0": f"{shaky_games.__name__}:Shaky"}):
        yield tmp_path / "policy"


def games(folder: Path, count: int) -> list[Game]:
    told: Any = {"round": 1, "split": "extraction", "env": "Shaky-v0", "params": {"marks": str(folder)}}
    return [Game(Episode(id=f"g{n}", seed=n, map_hash=str(n), **told), SAMPLING) for n in range(count)]


def nodes_of(actors: Any) -> list[str]:
    ask = [actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()) for actor in actors]
    return ray.get(ask, timeout=60)


def test_a_node_that_joins_takes_games_and_one_that_dies_loses_none(policy: Path, tmp_path: Path) -> None:
    collectors = {"num_cpus": 2, "resources": {"collector": 2}}
    limits = CollectConfig(players=2, max_players=4, seats=2, resources={"collector": 1}, step_deadline_s=5)
    log, total = tmp_path / "log", 120
    with raylets(collectors, {"num_cpus": 4}) as cluster:
        joined: dict[str, float] = {}
        lost: list[float] = []

        def disturb(done: int) -> None:
            if done >= 10 and not joined:
                node = cluster.add_node(**collectors)
                joined[node.node_id] = time.monotonic()
            asked = log.read_text().split() if log.exists() else []
            if joined and not lost and asked.count(next(iter(joined))) >= 8:
                lost.append(time.monotonic() - next(iter(joined.values())))
                (old,) = (node for node in cluster.worker_nodes if node.node_id == asked[0])
                cluster.remove_node(old, allow_graceful=False)

        with player_pool(RunConfig(collect=limits), policy, Slow(log)) as gamers:
            played = gamers.play(games(tmp_path / "marks", total), disturb)
            failures = gamers.pop_failures()
    assert [game.id for game, _ in played] == [f"g{n}" for n in range(total)]
    asked = set(log.read_text().split())
    assert len(asked) == 2 and joined.keys() < asked  # on collectors alone, though another node had four CPUs
    assert lost and lost[0] < 20, lost
    assert set(failures) <= {"a player died", "a player did not answer"} and failures


def test_players_keep_away_from_gpus_as_long_as_there_is_room(policy: Path, tmp_path: Path) -> None:
    with raylets({"num_cpus": 8, "num_gpus": 2}, {"num_cpus": 2}):
        (small,) = (node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU") == 2)
        with player_pool(RunConfig(collect=CollectConfig(players=3)), policy, Slow(tmp_path / "log")) as gamers:
            assert nodes_of(gamers.actors).count(small) == 2
