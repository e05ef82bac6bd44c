"""A stage of games on two real vLLM engines while something is killed or stopped: it ends in bounded time, with every
game as if nothing had been, and the counters tell what happened.
"""

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from oel_ray.cluster.session import ray_cluster
from oel_ray.config.load import parse_config
from oel_ray.config.schema import RunConfig
from oel_ray.engines.client import Pool
from oel_ray.engines.pool import engine_pool
from oel_ray.envs.splits import training_episodes
from oel_ray.play.players import Game, Players, player_pool
from oel_ray.records import Trajectory
from tests.support.served import assert_gone, children
from tests.support.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow

GAMES = 32
BOUND_S = 150.0
"""Two starts of an engine, with all that a busy machine adds."""


@dataclass
class Stage:
    config: RunConfig
    pool: Pool
    players: Players

    def play(self, at: int = 0, fault: Callable[[], object] | None = None) -> tuple[list[Trajectory], dict[str, int]]:
        """Play a stage, in which `fault` happens once `at` games have ended; what the counters say of it."""
        episodes = training_episodes(self.config.env, 3, 1, "extraction", GAMES, set())
        sampling = self.config.collect.sampling.sampling()
        faults = [fault] if fault else []
        slowest = 0.0

        def on_progress(done: int) -> None:
            nonlocal slowest
            if done >= at and faults:
                faults.pop()()
            asked = time.monotonic()
            self.pool.counts()
            slowest = max(slowest, time.monotonic() - asked)

        before, started = self.pool.counts(), time.monotonic()
        played = self.players.play([Game(episode, sampling) for episode in episodes], on_progress)
        seconds = time.monotonic() - started
        happened = self.pool.counts()
        happened.subtract(before)
        counts = {name: happened[name] for name in ("engine_restarts", "requests_moved")}
        failures = self.players.pop_failures()
        print(f"{seconds:.1f} s, {counts}, {failures}, slowest answer of the pool {slowest:.3f} s")
        assert seconds < BOUND_S and slowest < 1
        assert [game.id for game, _ in played] == [episode.id for episode in episodes]
        assert {turn.weight_version for game, _ in played for turn in game.turns} == {"r000"}
        return [game for game, _ in played], counts | failures


@contextmanager
def serving(model: Path, name: str, player_count: int, max_tokens: int, **engines: Any) -> Iterator[Stage]:
    """Players and engines of a run with that model, which is deployed."""
    config = parse_config(
        {
            "model": str(model),
            "env": {"params": {"size": 3, "num_holes": 2}, "max_turns": 4},
            "collect": {"players": player_count, "seats": 8, "sampling": {"max_tokens": max_tokens}},
            "engines": {"dtype": "float32", "device": "cpu", "max_model_len": 4096, **engines},
            "extract": {"max_tokens": 64, "sampling": {"max_tokens": 64}},
        }
    )
    with (
        ray_cluster(config, name, print),
        engine_pool(config.engines, model, on_gpu=False) as pool,
        player_pool(config, model, pool.client) as gamers,
    ):
        pool.deploy(model, "r000")
        yield Stage(config, pool, gamers)


def test_a_killed_vllm_worker_ends_its_engine_which_is_replaced(tmp_path: Path) -> None:
    """With tensor parallelism the ranks are processes of their own, below the core."""
    with serving(save_tiny_model(tmp_path), "test-workers", 1, 64, tensor_parallel=2, stall_deadline_s=30) as stage:
        (core,) = cores()
        workers = core.children(recursive=True)
        assert len(workers) >= 2
        _, happened = stage.play(4, workers[-1].kill)
        assert happened["engine_restarts"] == 1
        assert_gone([core, *workers])


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    model = save_tiny_model(tmp_path_factory.mktemp("model"))
    engines = {"count": 2, "max_num_seqs": 16, "stall_deadline_s": 10, "max_restarts": 10}
    with serving(model, "test-faults", 2, 200, **engines) as stage:
        yield stage


@pytest.fixture(scope="module")
def undisturbed(stage: Stage) -> list[Trajectory]:
    games, happened = stage.play()
    assert set(happened.values()) == {0}
    return games


def cores() -> list[psutil.Process]:
    """The engine cores of vLLM, oldest first."""
    found = [process for process in children() if "EngineCore" in " ".join(process.cmdline())]
    return sorted(found, key=lambda process: process.create_time())


def both_engines(stage: Stage) -> None:
    """Wait until both serve again."""
    stage.pool.deploy(Path(stage.config.model), "r000")
    assert len(cores()) == 2


def test_a_core_killed_while_it_writes_is_replaced_and_the_games_stay_the_same(
    stage: Stage, undisturbed: list[Trajectory]
) -> None:
    core = cores()[0]
    actor = core.parent()
    games, happened = stage.play(4, core.kill)
    assert games == undisturbed
    assert happened["engine_restarts"] == 1 and happened["requests_moved"] >= 1
    both_engines(stage)
    assert actor
    assert_gone([core, actor])


def test_a_core_killed_while_idle_is_replaced_and_the_games_stay_the_same(
    stage: Stage, undisturbed: list[Trajectory]
) -> None:
    """It is found out without a request, or by the first one."""
    cores()[0].kill()
    games, happened = stage.play()
    assert games == undisturbed
    assert happened["engine_restarts"] == 1
    both_engines(stage)


@pytest.mark.parametrize("which", ["core", "actor"])
def test_an_engine_stopped_while_it_writes_is_replaced_and_the_games_stay_the_same(
    stage: Stage, undisturbed: list[Trajectory], which: str
) -> None:
    core = cores()[0]
    actor = core.parent()
    assert actor
    games, happened = stage.play(4, lambda: (core if which == "core" else actor).send_signal(signal.SIGSTOP))
    assert games == undisturbed
    assert happened["engine_restarts"] == 1 and happened["requests_moved"] >= 1
    both_engines(stage)
    assert_gone([core, actor])


def test_both_cores_killed_while_they_write_are_replaced_and_the_games_stay_the_same(
    stage: Stage, undisturbed: list[Trajectory]
) -> None:
    games, happened = stage.play(4, lambda: [core.kill() for core in cores()])
    assert games == undisturbed
    assert happened["engine_restarts"] == 2
    both_engines(stage)


def test_a_killed_player_is_replaced_and_the_games_stay_the_same(stage: Stage, undisturbed: list[Trajectory]) -> None:
    player = next(process for process in children() if re.match(r"ray::(\S+:)?Player\b", " ".join(process.cmdline())))
    games, happened = stage.play(4, player.kill)
    assert games == undisturbed
    assert happened["a player died"] == 1 and happened["engine_restarts"] == 0
