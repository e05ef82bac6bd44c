"""Games on real Ray actors, with players that need no engine: what is known is never played again."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from oel_ray.errors import RunFailed
from oel_ray.play.players import Game, Players, play_missing
from oel_ray.records import Episode, Trajectory
from oel_ray.runs.journal import Journal
from tests.support.scripted import SAMPLING

pytestmark = pytest.mark.ray

SEATS = 2


class GatedPlayer:
    """Logs every game that it begins. Ends it at once, or when `gate` exists; fails those in `failing`."""

    def __init__(self, log: Path, gate: Path | None = None, failing: tuple[str, ...] = ()) -> None:
        self._log, self._gate, self._failing = log, gate, failing

    async def play(self, episode: Episode, *_: Any, **__: Any) -> tuple[Trajectory, bool]:
        import asyncio

        with self._log.open("a") as file:
            file.write(f"{episode.id}\n")
        while self._gate and not self._gate.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # another process makes the file
        if episode.id in self._failing:
            raise RuntimeError("no board")
        end = {"instructions": "", "template": "", "turns": [], "outcome": "", "ended_by": "environment"}
        return Trajectory(**episode.model_dump(), **end), True

    async def stuck(self, deadline_s: float) -> str:
        import asyncio

        await asyncio.sleep(deadline_s)
        return ""


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False)
    yield
    ray.shutdown()


def gated(log: Path, **options: Any) -> Players:
    actor = ray.remote(concurrency_groups={"watch": 10})(GatedPlayer).options(max_concurrency=SEATS, num_cpus=0)
    return Players([actor.remote(log, **options) for _ in range(2)], SEATS)


def games(count: int) -> list[Game]:
    return [
        Game(Episode(id=f"g-{n}", round=1, split="extraction", env="e", params={}, seed=n, map_hash=f"m{n}"), SAMPLING)
        for n in range(count)
    ]


def journal(folder: Path) -> Journal[Trajectory]:
    return Journal(folder / "games.jsonl", Trajectory, folder / "bad", "test")


def begun(log: Path) -> list[str]:
    return log.read_text().split()


def play(players: Players, count: int, folder: Path, seen: list[int]) -> list[str]:
    played = play_missing(players, games(count), journal(folder), lambda _, trajectory, __: trajectory, seen.append)
    return [trajectory.id for trajectory in played]


def test_after_a_failure_only_the_missing_games_are_played(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="game g-3 failed 3 times: RuntimeError: no board"):
        play(gated(tmp_path / "first", failing=("g-3",)), 6, tmp_path, [])
    known = {trajectory.id for trajectory in journal(tmp_path).records}
    assert known and "g-3" not in known
    seen: list[int] = []
    assert play(gated(tmp_path / "second"), 8, tmp_path, seen) == [f"g-{n}" for n in range(8)]
    assert sorted(begun(tmp_path / "second")) == sorted({f"g-{n}" for n in range(8)} - known)
    assert (seen[0], seen[-1]) == (len(known), 8)
    assert play(gated(tmp_path / "third"), 8, tmp_path, []) == [f"g-{n}" for n in range(8)]
    assert not (tmp_path / "third").exists()


def test_a_run_that_is_asked_to_stop_ends_the_games_in_play_and_begins_none(tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"

    def on_progress(done: int) -> None:
        if log.exists() and len(begun(log)) == 2 * SEATS and not gate.exists():
            os.kill(os.getpid(), signal.SIGTERM)
            gate.touch()

    with pytest.raises(KeyboardInterrupt):
        play_missing(
            gated(log, gate=gate), games(10), journal(tmp_path), lambda _, trajectory, __: trajectory, on_progress
        )
    in_play = sorted(begun(log))
    assert len(in_play) == 2 * SEATS
    assert sorted(trajectory.id for trajectory in journal(tmp_path).records) == in_play
    play(gated(log), 10, tmp_path, [])
    assert sorted(begun(log)) == [f"g-{n}" for n in range(10)], "each game was begun once"


def test_a_second_signal_stops_the_stage_without_waiting_for_its_games(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def on_progress(done: int) -> None:
        if log.exists() and len(begun(log)) == 2 * SEATS:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        play_missing(
            gated(log, gate=tmp_path / "never"),
            games(10),
            journal(tmp_path),
            lambda _, trajectory, __: trajectory,
            on_progress,
        )
    assert journal(tmp_path).records == []
    play(gated(log), 10, tmp_path, [])
