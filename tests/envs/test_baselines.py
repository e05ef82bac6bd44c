"""Random and oracle players on real games."""

from oel_ray.config.schema import EnvironmentConfig
from oel_ray.envs.baselines import oracle_rate, random_rate
from oel_ray.envs.splits import held_out_episodes

LAKE = EnvironmentConfig(id="FrozenLake-v0", params={"size": 3, "num_holes": 2})
ROOM = EnvironmentConfig(id="Sokoban-v0", params={"num_boxes": 1})


def test_the_random_rate_depends_on_its_seed_alone_and_the_oracle_wins_with_enough_turns() -> None:
    episodes = held_out_episodes(LAKE, 5, 19)
    rate = random_rate(episodes, 10, 40, 5)
    assert rate is not None and 0.0 < rate < 0.3
    assert rate == random_rate(episodes, 10, 40, 5)
    assert rate != random_rate(episodes, 10, 40, 6)
    assert oracle_rate(episodes, 5) == 1.0
    assert oracle_rate(episodes, 3) == 0.0


def test_more_turns_help_the_random_player() -> None:
    episodes = held_out_episodes(ROOM, 5, 10)
    assert random_rate(episodes, 1, 20, 5) < random_rate(episodes, 12, 20, 5)


def test_the_oracle_loses_maps_that_need_more_turns_than_allowed() -> None:
    assert oracle_rate(held_out_episodes(EnvironmentConfig(), 5, 6), 5) == 0.0
    share = oracle_rate(held_out_episodes(ROOM, 5, 30), 2)
    assert share is not None and 0.0 < share < 1.0


def test_the_default_game_can_be_won_within_its_turns() -> None:
    env = EnvironmentConfig()
    assert oracle_rate(held_out_episodes(env, 5, 6), env.max_turns) == 1.0


def test_games_without_actions_have_no_baselines() -> None:
    episodes = held_out_episodes(EnvironmentConfig(id="2048-v0"), 5, 2)
    assert random_rate(episodes, 5, 2, 5) is None
    assert oracle_rate(episodes, 5) is None
