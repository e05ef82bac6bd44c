"""Planned games: disjoint by content or with the official seeds, deterministic, and clear about too few maps."""

import pytest

from oel_ray.config.schema import EnvironmentConfig
from oel_ray.envs import make
from oel_ray.envs.splits import held_out_episodes, training_episodes
from oel_ray.errors import UserError

LAKE = EnvironmentConfig(id="FrozenLake-v0", params={"size": 3, "num_holes": 2})
ROOM = EnvironmentConfig(id="Sokoban-v0", params={"num_boxes": 1})


def changed(env: EnvironmentConfig, **changes: object) -> EnvironmentConfig:
    return env.model_copy(update=changes)


@pytest.mark.parametrize("env", [LAKE, ROOM])
def test_held_out_and_training_share_no_map(env: EnvironmentConfig) -> None:
    held_out = held_out_episodes(env, 7, 9)
    hashes = {episode.map_hash for episode in held_out}
    assert len(hashes) == 9
    assert [episode.id for episode in held_out][:2] == ["h-0000", "h-0001"]
    assert {(episode.round, episode.split) for episode in held_out} == {(0, "held_out")}
    seeds = set()
    for round_number in (1, 2):
        for split, letter in (("extraction", "x"), ("consolidation", "c")):
            episodes = training_episodes(env, 7, round_number, split, 40, hashes)
            assert [episode.id for episode in episodes] == [f"r{round_number:03d}-{letter}-{i:04d}" for i in range(40)]
            assert not hashes & {episode.map_hash for episode in episodes}
            assert {(episode.round, episode.split) for episode in episodes} == {(round_number, split)}
            seeds |= {episode.seed for episode in episodes}
    assert len(seeds) == 160
    for episode in held_out[:3]:
        assert make(env.id, episode.seed, env.params).map_hash == episode.map_hash


@pytest.mark.parametrize("split", ["by_map", "paper"])
def test_plans_are_deterministic(split: str) -> None:
    env = changed(LAKE, split=split)
    assert held_out_episodes(env, 1, 5) == held_out_episodes(env, 1, 5)
    assert held_out_episodes(env, 1, 5) == held_out_episodes(env, 1, 8)[:5]
    one = training_episodes(env, 1, 1, "extraction", 5, set())
    assert one == training_episodes(env, 1, 1, "extraction", 5, set())


def test_plans_depend_on_the_run_seed() -> None:
    assert held_out_episodes(LAKE, 1, 5) != held_out_episodes(LAKE, 2, 5)


def test_the_3x3_lake_has_19_maps() -> None:
    episodes = held_out_episodes(LAKE, 3, 19)
    assert len({episode.map_hash for episode in episodes}) == 19
    with pytest.raises(UserError, match=r"only 19 distinct maps.*20.*evaluate\.maps"):
        held_out_episodes(LAKE, 3, 20)


def test_a_split_that_leaves_no_training_map_is_refused() -> None:
    hashes = {episode.map_hash for episode in held_out_episodes(LAKE, 3, 19)}
    with pytest.raises(UserError, match=r"19 distinct maps.*evaluate\.maps"):
        training_episodes(LAKE, 3, 1, "extraction", 1, hashes)


def test_training_repeats_maps_where_there_are_few() -> None:
    hashes = {episode.map_hash for episode in held_out_episodes(LAKE, 3, 18)}
    episodes = training_episodes(LAKE, 3, 1, "consolidation", 30, hashes)
    assert len(episodes) == 30 and len({episode.map_hash for episode in episodes}) == 1


def test_the_paper_split_uses_the_seeds_of_the_official_code() -> None:
    env = changed(LAKE, split="paper")
    held_out = held_out_episodes(env, 3, 40)
    assert [episode.seed for episode in held_out] == [468460046 + 1000 * i for i in range(40)]
    hashes = {episode.map_hash for episode in held_out}
    assert len(hashes) < 20
    for round_number in (1, 2, 3):
        extraction = training_episodes(env, 3, round_number, "extraction", 15, hashes)
        first = 468460046 + 500000 * round_number
        assert [episode.seed for episode in extraction] == [first + 1000 * i for i in range(128, 143)]
        consolidation = training_episodes(env, 3, round_number, "consolidation", 30, hashes)
        first = 505209463 + 10**7 * (round_number - 1)
        assert [episode.seed for episode in consolidation] == [first + 1000 * j for j in range(30)]
    assert {episode.map_hash for episode in consolidation} & hashes


@pytest.mark.parametrize("split", ["by_map", "paper"])
def test_only_maps_with_solutions_within_the_bounds_are_drawn(split: str) -> None:
    env = changed(ROOM, split=split, min_solution=4, max_turns=5)
    every = changed(ROOM, split=split)
    held_out = held_out_episodes(env, 3, 8)
    hashes = {episode.map_hash for episode in held_out}
    learnt_on = [training_episodes(env, 3, 2, name, 8, hashes) for name in ("extraction", "consolidation")]
    for episodes in (held_out, *learnt_on):
        lengths = {len(make(env.id, episode.seed, env.params).solution() or []) for episode in episodes}
        assert lengths <= {4, 5}
    if split == "paper":
        seeds = [episode.seed for episode in held_out]
        assert seeds != [episode.seed for episode in held_out_episodes(every, 3, 8)]
        assert seeds == sorted(seeds) and {(seed - 468460046) % 1000 for seed in seeds} == {0}


@pytest.mark.parametrize("split", ["by_map", "paper"])
@pytest.mark.parametrize("changes", [{"min_solution": 5, "max_turns": 10}, {"min_solution": 4, "max_turns": 3}])
def test_bounds_that_no_map_meets_are_refused_with_the_lengths_found(split: str, changes: dict) -> None:
    with pytest.raises(UserError, match=r"solutions of \d to \d+ moves.*env\.min_solution.*env\.max_turns"):
        held_out_episodes(changed(LAKE, split=split, **changes), 3, 2)
    with pytest.raises(UserError, match=r"solutions of \d to \d+ moves.*env\.min_solution.*env\.max_turns"):
        training_episodes(changed(LAKE, split=split, **changes), 3, 1, "extraction", 2, set())


def test_a_game_without_solutions_cannot_be_chosen_by_length() -> None:
    with pytest.raises(UserError, match=r"2048-v0 cannot tell.*env\.min_solution must be 0"):
        held_out_episodes(EnvironmentConfig(id="2048-v0", min_solution=1), 3, 2)
