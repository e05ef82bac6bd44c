"""Compute the pass rates of a random and a perfect player, the baselines of every pass rate. Runs in the driver."""

import random
from collections.abc import Sequence

from oel_ray.envs.base import Environment
from oel_ray.envs.registry import make
from oel_ray.records import Episode
from oel_ray.seeds import derive_seed


def random_rate(episodes: Sequence[Episode], max_turns: int, games: int, run_seed: int) -> float | None:
    """Measure the pass rate of random actions over `games` games per episode; None if there is no list of actions."""
    wins = []
    for episode in episodes:
        for game in range(games):
            environment = make(episode.env, episode.seed, episode.params)
            if not environment.actions:
                return None
            seed = derive_seed(run_seed, "random_player", episode.id, game)
            wins.append(_random_game(environment, max_turns, random.Random(seed)))
    return sum(wins) / len(wins) if wins else None


def oracle_rate(episodes: Sequence[Episode], max_turns: int) -> float | None:
    """Compute the share of episodes that can be won within `max_turns` moves; None if solutions are unknown."""
    solved = []
    for episode in episodes:
        solution = make(episode.env, episode.seed, episode.params).solution()
        if solution is None:
            return None
        solved.append(0 < len(solution) <= max_turns)
    return sum(solved) / len(solved) if solved else None


def _random_game(environment: Environment, max_turns: int, choices: random.Random) -> bool:
    environment.reset()
    for _ in range(max_turns):
        if environment.step(choices.choice(environment.actions)).done:
            break
    return environment.success()
