"""`oel envs`: nothing vanishes, nothing is downloaded, numbers are those of the players."""

import time
from collections.abc import Iterator
from io import StringIO

import nltk
import pytest
from rich.console import Console, RenderableType

from oel_ray.config.schema import EnvironmentConfig
from oel_ray.envs.registry import known_ids
from oel_ray.views import environments as catalog_module
from oel_ray.views.environments import catalog, catalog_table, description, facts
from tests.support.installed import installed

LAKE = EnvironmentConfig(id="FrozenLake-v0", params={"size": 3, "num_holes": 2})


@pytest.fixture(scope="module", autouse=True)
def games(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    entries = {"zoo": "tests.support.broken_games:Good", "absent": "no_such_module:Game"}
    with installed(tmp_path_factory.mktemp("games"), entries):
        yield


def printed(what: RenderableType) -> str:
    out = StringIO()
    Console(file=out, width=80).print(what)
    return out.getvalue()


def test_every_environment_is_listed_and_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk, "download", lambda *_, **__: pytest.fail("a download"))
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    began = time.monotonic()
    entries = {entry.env_id: entry for entry in catalog()}
    assert time.monotonic() - began < 5
    assert list(entries) == known_ids()
    assert list(entries)[:2] == ["absent", "zoo"]
    assert entries["zoo"].source == "games-for-tests" and entries["zoo"].parameters is None
    assert "no_such_module" in entries["absent"].obstacle
    assert entries["FrozenLake-v0-hardcore"].parameters == {"size": 5, "num_holes": 6, "randomize_start_goal": False}
    blocked = {name.partition("-")[0] for name, entry in entries.items() if entry.obstacle}
    words = {"Hangman", "Wordle", "WordLadder", "WordSearch"}
    assert blocked == {"absent", "Klondike", "UltimateTexasHoldem", "GuessWho", "TwentyQuestions", *words}
    text = printed(catalog_table())
    assert all(name in text for name in entries)
    assert max(map(len, text.splitlines())) <= 80


def test_facts_of_a_lake_hold_its_maps_and_the_rates_of_random_and_perfect_play() -> None:
    found = facts(LAKE)
    assert (found.seeds, found.measured, found.oracle) == (64, found.maps, 1.0)
    assert 15 <= found.maps <= 19
    assert found.random is not None and found.random < 0.3
    assert facts(LAKE.model_copy(update={"max_turns": 3})).oracle == 0.0
    bare = facts(EnvironmentConfig(id="2048-v0"))
    assert (bare.random, bare.oracle) == (None, None)


def test_a_slow_environment_is_measured_on_fewer_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "_PATIENCE_S", 0.005)
    found = facts(LAKE)
    assert found.seeds < 64 and found.measured < 10


def test_a_description_fits_80_columns_and_tells_parameters_board_and_rates() -> None:
    text = printed(description(LAKE))
    for part in ("FrozenLake-v0, from TextArena", "num_holes", "You are P on the board", "|  P  |", "with 10 turns"):
        assert part in text
    assert "100.0% won on" in text and "among 64 seeds" in text
    assert max(map(len, text.splitlines())) <= 80
    text = printed(description(EnvironmentConfig(id="zoo", max_turns=7)))
    assert "zoo, from games-for-tests" in text and "(its package does not tell)" in text and "with 7 turns" in text
    assert "none: the environment tells no solution" in printed(description(EnvironmentConfig(id="2048-v0")))
