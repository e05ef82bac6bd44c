"""Planned games: disjoint by content, deterministic, and clear about too few maps."""

import pytest

from oel_ray.envs import make
from oel_ray.envs.splits import held_out_episodes, training_episodes
from oel_ray.errors import UserError

LAKE = ("FrozenLake-v0", {"size": 3, "num_holes": 2})
ROOM = ("Sokoban-v0", {"num_boxes": 1})


@pytest.mark.parametrize(("env", "params"), [LAKE, ROOM])
def test_held_out_and_training_share_no_map(env: str, params: dict) -> None:
    held_out = held_out_episodes(env, params, 7, 9)
    hashes = {episode.map_hash for episode in held_out}
    assert len(hashes) == 9
    assert [episode.id for episode in held_out][:2] == ["h-0000", "h-0001"]
    assert {(episode.round, episode.split) for episode in held_out} == {(0, "held_out")}
    seeds = set()
    for round_number in (1, 2):
        for split, letter in (("extraction", "x"), ("consolidation", "c")):
            episodes = training_episodes(env, params, 7, round_number, split, 40, hashes)
            assert [episode.id for episode in episodes] == [f"r{round_number:03d}-{letter}-{i:04d}" for i in range(40)]
            assert not hashes & {episode.map_hash for episode in episodes}
            assert {(episode.round, episode.split) for episode in episodes} == {(round_number, split)}
            seeds |= {episode.seed for episode in episodes}
    assert len(seeds) == 160
    for episode in held_out[:3]:
        assert make(env, episode.seed, params).map_hash == episode.map_hash


def test_plans_are_deterministic_and_depend_on_the_run_seed() -> None:
    assert held_out_episodes(*LAKE, 1, 5) == held_out_episodes(*LAKE, 1, 5)
    assert held_out_episodes(*LAKE, 1, 5) != held_out_episodes(*LAKE, 2, 5)
    assert held_out_episodes(*LAKE, 1, 5) == held_out_episodes(*LAKE, 1, 8)[:5]
    one = training_episodes(*LAKE, 1, 1, "extraction", 5, set())
    assert one == training_episodes(*LAKE, 1, 1, "extraction", 5, set())


def test_the_3x3_lake_has_19_maps() -> None:
    episodes = held_out_episodes(*LAKE, 3, 19)
    assert len({episode.map_hash for episode in episodes}) == 19
    with pytest.raises(UserError, match=r"only 19 distinct maps.*20.*evaluate\.maps"):
        held_out_episodes(*LAKE, 3, 20)


def test_no_map_left_to_learn_on() -> None:
    hashes = {episode.map_hash for episode in held_out_episodes(*LAKE, 3, 19)}
    with pytest.raises(UserError, match=r"19 distinct maps.*evaluate\.maps"):
        training_episodes(*LAKE, 3, 1, "extraction", 1, hashes)


def test_training_repeats_maps_where_there_are_few() -> None:
    hashes = {episode.map_hash for episode in held_out_episodes(*LAKE, 3, 18)}
    episodes = training_episodes(*LAKE, 3, 1, "consolidation", 30, hashes)
    assert len(episodes) == 30 and len({episode.map_hash for episode in episodes}) == 1
