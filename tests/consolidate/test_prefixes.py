from collections import Counter
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oel_ray.config.schema import ConsolidateConfig
from oel_ray.consolidate.prefixes import Plan, prefixes, step_batches
from oel_ray.distill.batches import Sample
from oel_ray.errors import RunFailed, UserError
from oel_ray.records import Prefix
from oel_ray.text import prompts
from oel_ray.text.chat import ChatFormat
from tests.support.tokenizers_for_tests import small_tokenizer
from tests.support.trajectories_for_tests import make_trajectory


@pytest.fixture
def chat() -> ChatFormat:
    return ChatFormat(small_tokenizer(), thinking=False)


def some_prefixes(*turns_per_game: int) -> list[Prefix]:
    return [
        Prefix(id=f"g{game}/{turn}", trajectory_id=f"g{game}", turn=turn, prompt_ids=[])
        for game, turns in enumerate(turns_per_game)
        for turn in range(turns)
    ]


def plan(items: list[Prefix], batching: Literal["shuffled", "by_game"], **more: Any) -> Plan:
    settings = {"knowledge_count": 3, "steps": 4, "games_per_step": 2, "run_seed": 1, "round_number": 1, **more}
    config = ConsolidateConfig(batching=batching, **{key: settings.pop(key) for key in ("steps", "games_per_step")})
    return step_batches(items, config=config, **settings)


@pytest.mark.parametrize("recorded", [True, False])
def test_every_turn_is_a_prefix_with_the_ids_of_the_game(chat: ChatFormat, recorded: bool) -> None:
    games = [make_trajectory("a", 3, chat), make_trajectory("b", 1, chat), make_trajectory("none", 0)]
    stripped = [make_trajectory("a", 3), make_trajectory("b", 1), make_trajectory("none", 0)]
    found = prefixes(games if recorded else stripped, chat)
    assert [(prefix.id, prefix.trajectory_id, prefix.turn) for prefix in found] == [
        ("a/0", "a", 0),
        ("a/1", "a", 1),
        ("a/2", "a", 2),
        ("b/0", "b", 0),
    ]
    assert [prefix.prompt_ids for prefix in found] == [turn.prompt_ids for game in games for turn in game.turns]


def test_ids_that_are_not_those_of_the_text_are_refused_in_one_line(chat: ChatFormat) -> None:
    game = make_trajectory("a", 3, chat)
    turns = list(game.turns)
    turns[1] = turns[1].model_copy(update={"prompt_ids": [*turns[1].prompt_ids, 5]})
    with pytest.raises(RunFailed, match=r"^trajectory a, turn 1: .*$"):
        prefixes([make_trajectory("b", 1, chat), game.model_copy(update={"turns": turns})], chat)


def test_the_teacher_reads_the_students_prompt_with_the_knowledge_inserted(chat: ChatFormat) -> None:
    (prefix,) = prefixes([make_trajectory("a", 1, chat)], chat)
    head = len(chat.game_prefix_ids())

    def sample(knowledge: str) -> Sample:
        return Sample("a", prefix.prompt_ids, head, tuple(chat.game_prefix_ids(knowledge)), [5])

    for nothing in ("", " \n"):
        assert sample(nothing).teacher_prompt_ids == prefix.prompt_ids
        assert not sample(nothing).has_knowledge
    assert sample("H ends the game").has_knowledge
    teacher = sample("H ends the game").teacher_prompt_ids
    inserted = len(teacher) - len(prefix.prompt_ids)
    assert teacher[:head] + teacher[head + inserted :] == prefix.prompt_ids
    assert chat.tokenizer.decode(teacher[head : head + inserted]) == prompts.knowledge_section("H ends the game")


@given(st.lists(st.integers(1, 6), min_size=8, max_size=30), st.integers(1, 8), st.integers(0, 99))
def test_shuffled_uses_every_prefix_once_in_near_equal_parts(turns: list[int], steps: int, seed: int) -> None:
    items = some_prefixes(*turns)
    batches = plan(items, "shuffled", steps=steps, run_seed=seed)
    assert sorted(draw.prefix for batch in batches for draw in batch) == list(range(len(items)))
    sizes = [len(batch) for batch in batches]
    assert len(sizes) == steps
    assert max(sizes) - min(sizes) <= 1


def test_shuffled_mixes_games_and_depends_on_seed_and_round() -> None:
    items = some_prefixes(*[5] * 20)
    first = plan(items, "shuffled")
    assert [draw.prefix for batch in first for draw in batch] != list(range(100))
    assert first == plan(items, "shuffled")
    assert first != plan(items, "shuffled", run_seed=2)
    assert first != plan(items, "shuffled", round_number=2)


def test_by_game_gives_each_step_its_own_games() -> None:
    items = some_prefixes(3, 1, 2, 5, 1, 1, 4, 2, 9)
    batches = plan(items, "by_game")
    assert [[items[draw.prefix].id for draw in batch] for batch in batches] == [
        ["g0/0", "g0/1", "g0/2", "g1/0"],
        ["g2/0", "g2/1", "g3/0", "g3/1", "g3/2", "g3/3", "g3/4"],
        ["g4/0", "g5/0"],
        ["g6/0", "g6/1", "g6/2", "g6/3", "g7/0", "g7/1"],
    ]


@pytest.mark.parametrize("batching", ["shuffled", "by_game"])
def test_a_step_without_prefixes_is_an_error(batching: Literal["shuffled", "by_game"]) -> None:
    with pytest.raises(UserError, match="3 prefixes do not fill 4 steps"):
        plan(some_prefixes(1, 1, 1), batching)


def test_knowledge_is_drawn_uniformly_for_each_prefix_whatever_the_batching() -> None:
    items = some_prefixes(*[5] * 800)
    shuffled = plan(items, "shuffled", knowledge_count=10)
    draws = Counter(draw.knowledge for batch in shuffled for draw in batch)
    chi_square = sum((draws[index] - 400) ** 2 / 400 for index in range(10))
    assert chi_square < 27.9  # 9 degrees of freedom: exceeded once in a thousand seeds
    by_game = plan(items, "by_game", knowledge_count=10, games_per_step=200)
    assert sorted(draw for batch in by_game for draw in batch) == sorted(draw for batch in shuffled for draw in batch)
    other = plan(items, "shuffled", knowledge_count=10, round_number=2)
    assert dict(draw for batch in other for draw in batch) != dict(draw for batch in shuffled for draw in batch)
