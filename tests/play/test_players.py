"""Players on a real Ray, in which games and players go wrong: every game is played, exactly once, and what happened is
counted; or the run ends with the reason.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import oel_ray.cluster.session  # noqa: F401 - sets what Ray reads when it is imported

import ray  # isort: skip

from oel_ray.cluster.stacks import HANG_FOLDER
from oel_ray.config.schema import CollectConfig, EnvironmentConfig, RunConfig
from oel_ray.envs.splits import training_episodes
from oel_ray.errors import RunFailed
from oel_ray.play.player import player_actor
from oel_ray.play.players import Game, Players, player_pool
from oel_ray.records import Episode, Trajectory
from tests.support import shaky_games
from tests.support.installed import installed
from tests.support.scripted import SAMPLING, ScriptedGenerate
from tests.support.tokenizers_for_tests import small_tokenizer

pytestmark = pytest.mark.ray

SEATS = 4
LIMITS = CollectConfig(step_deadline_s=1.5)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("policy")
    small_tokenizer().save_pretrained(folder)
    with installed(tmp_path_factory.mktemp("installed"), {"Shaky-v0": f"{shaky_games.__name__}:Shaky"}):
        ray.init(address="local", num_cpus=10, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield folder
        ray.shutdown()


@pytest.fixture(scope="module")
def gamers(policy: Path) -> Iterator[Players]:
    config = RunConfig(collect=LIMITS.model_copy(update={"players": 2, "seats": SEATS}))
    with player_pool(config, policy, ScriptedGenerate(["[go]"])) as gamers:
        yield gamers


def shaky(folder: Path, count: int, **params: Any) -> list[Game]:
    marks = {"marks": str(folder), **params}
    return [
        Game(
            Episode(
                id=f"g{n}",
                round=1,
                split="extraction",
                env="Shaky-v0",
                params=marks,
                seed=n,
                map_hash=str(n),
            ),
            SAMPLING,
        )
        for n in range(count)
    ]


def ids(played: list[tuple[Trajectory, bool]]) -> list[str]:
    assert all(won and len(game.turns) == 2 for game, won in played)
    return [game.id for game, _ in played]


def test_no_more_games_are_in_play_than_there_are_seats(gamers: Players, tmp_path: Path) -> None:
    games, begun = shaky(tmp_path, 12), list[int]()
    played = Players(gamers.actors[:1], 3).play(games, lambda done: begun.append(len(list(tmp_path.iterdir())) - done))
    assert ids(played) == [f"g{n}" for n in range(12)]
    assert max(begun) <= 3


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_the_same_seeds_give_the_same_boards_on_many_players_as_on_one(
    gamers: Players, policy: Path, count: int
) -> None:
    configs = [
        EnvironmentConfig(id="FrozenLake-v0", params={"size": 4, "num_holes": 3}),
        EnvironmentConfig(id="Sokoban-v0", params={"num_boxes": 1}),
    ]
    games = [
        Game(episode, SAMPLING)
        for config in configs
        for episode in training_episodes(config, 4, 1, "extraction", 4 * count, set())
    ]
    more = [
        player_actor(SEATS, num_cpus=1).remote(policy, ScriptedGenerate(["[go]"]), RunConfig())
        for _ in range(count - 2)
    ]
    boards: list[list[list[str]]] = []
    for some in (Players(gamers.actors[:1], 1), Players([*gamers.actors, *more], SEATS)):
        played = some.play(games, lambda _: None)
        assert some.pop_failures() == {}
        boards.append([[turn.observation for turn in game.turns] for game, _ in played])
    for actor in more:
        ray.kill(actor)
    assert boards[0] == boards[1]
    assert len({board[0] for board in boards[0]}) > count


def test_a_game_that_always_fails_ends_the_run_with_its_name(gamers: Players, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"^game g3 failed 3 times: an environment raised ValueError: no road at 3$"):
        gamers.play(shaky(tmp_path, 8, raises=[3], times=9), lambda _: None)
    assert gamers.pop_failures() == {"an environment raised ValueError": 2}


def test_too_many_failures_end_the_run_with_the_most_frequent_one(gamers: Players, tmp_path: Path) -> None:
    games = shaky(tmp_path, 40, raises=[1, 3, 5, 7, 9, 11, 13], exits=[2])
    strict = Players(gamers.actors, SEATS, LIMITS.model_copy(update={"max_error_rate": 0.0}))
    said = r"^6 failures, and collect.max_error_rate=0 allows 5; [56] times an environment raised ValueError: no road"
    with pytest.raises(RunFailed, match=said):
        strict.play(games, lambda _: None)


def test_every_game_is_played_once_whatever_goes_wrong(
    gamers: Players, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of twenty hangs for ever: all others of its player are played again, too, and that is nobody's fault.

    Where it hung is in the run folder.
    """
    monkeypatch.setenv(HANG_FOLDER, str(tmp_path / "hang"))
    games = shaky(tmp_path, 20, hangs=[3], raises=[5, 16], exits=[8], dies=[19])
    reports: list[int] = []
    played = gamers.play(games, reports.append)
    assert ids(played) == [f"g{n}" for n in range(20)]
    assert reports == sorted(reports) and reports[-1] == 20
    failures = gamers.pop_failures()
    # What raised in a player just before that was killed may not have been told, and the game is played again all the
    # same.
    assert failures.pop("an environment raised ValueError") in (1, 2)
    assert failures.pop("an environment raised SystemExit", 1) == 1
    assert failures == {"an environment hung": 1, "a player died": 1}
    stacks = {file.stem: file.read_text() for file in tmp_path.glob("hang/*/*.txt")}
    assert {"player-0", "player-1"} <= stacks.keys()
    assert ["shaky_games.py" in text and "in _fail" in text for text in stacks.values()].count(True) == 1
    assert gamers.pop_failures() == {}
