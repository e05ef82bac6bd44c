"""Choose the games of a run before any is played. Runs in the driver; builds environments, plays none.

With `env.split=by_map` maps are compared by content, because two seeds often draw the same board. With `paper` the
seeds are the official code's, and maps may repeat within a split and between splits.
"""

from collections.abc import Iterator, Set
from itertools import count as count_up

from oel_ray.config.schema import EnvironmentConfig
from oel_ray.envs.registry import make
from oel_ray.errors import UserError
from oel_ray.ids import held_out_id, training_id
from oel_ray.records import Episode, Split, TrainingSplit
from oel_ray.seeds import derive_seed

# After this many draws in a row without a new map the environment counts as exhausted.
_PATIENCE = 1000
_NONE_FITS = "lower env.min_solution or raise env.max_turns"


def held_out_episodes(env: EnvironmentConfig, run_seed: int, maps: int) -> list[Episode]:
    """Choose games on `maps` maps for evaluation only, the same in every round. With `by_map` the maps are distinct.

    Raises:
        UserError: the environment has fewer such maps, or cannot tell solutions and `env.min_solution` asks for them.
    """
    drawn, found = _draw(env, _seeds(env, run_seed, "held_out", 0), maps, set(), repeat=env.split == "paper")
    if len(drawn) < maps:
        raise UserError(
            f"{_maps(env)}: only {len(found)} distinct maps were found, and {maps} are to be held out: "
            + (f"lower evaluate.maps below {len(found)}, so that maps are left to learn on" if found else _NONE_FITS)
        )
    return [
        episode(held_out_id(number), 0, "held_out", env, seed, map_hash)
        for number, (seed, map_hash) in enumerate(drawn)
    ]


def training_episodes(
    env: EnvironmentConfig,
    run_seed: int,
    round_number: int,
    split: TrainingSplit,
    count: int,
    held_out: Set[str],
) -> list[Episode]:
    """Choose `count` games of one round to learn from; maps may repeat. With `by_map` no map's hash is in `held_out`.

    Raises:
        UserError: every map that the environment draws is held out, or it cannot tell solutions; see above.
    """
    excluded = held_out if env.split == "by_map" else set()
    drawn, found = _draw(env, _seeds(env, run_seed, split, round_number), count, excluded, repeat=True)
    if len(drawn) < count:
        raise UserError(
            f"{_maps(env)}: no map is left to learn on: {len(found)} distinct maps were found and "
            f"{len(found & excluded)} of them are held out: " + ("lower evaluate.maps" if found else _NONE_FITS)
        )
    return [
        episode(training_id(round_number, split, number), round_number, split, env, seed, map_hash)
        for number, (seed, map_hash) in enumerate(drawn)
    ]


def _draw(
    env: EnvironmentConfig, seeds: Iterator[int], count: int, excluded: Set[str], *, repeat: bool
) -> tuple[list[tuple[int, str]], set[str]]:
    """Draw seeds until `count` maps are found. Returns their seeds and hashes, and all maps seen that are long enough.

    There are fewer than `count` if the environment seems exhausted.
    """
    drawn: list[tuple[int, str]] = []
    found: set[str] = set()
    fruitless = 0
    while len(drawn) < count and fruitless < _PATIENCE:
        seed = next(seeds)
        map_hash, fits = _look_at(env, seed)
        if fits and map_hash not in excluded and (repeat or map_hash not in found):
            drawn.append((seed, map_hash))
            fruitless = 0
        else:
            fruitless += 1
        if fits:
            found.add(map_hash)
    return drawn, found


def _look_at(env: EnvironmentConfig, seed: int) -> tuple[str, bool]:
    """Compute the hash of a seed's map, and whether the length of its solution is within the bounds."""
    environment = make(env.id, seed, env.params)
    if not env.min_solution:
        return environment.map_hash, True
    solution = environment.solution()
    if solution is None:
        raise UserError(f"{env.id} cannot tell how its maps are solved: env.min_solution must be 0 with it")
    return environment.map_hash, env.min_solution <= len(solution) <= env.max_turns


def _seeds(env: EnvironmentConfig, run_seed: int, split: Split, round_number: int) -> Iterator[int]:
    if env.split == "paper":
        first = {
            "held_out": 468_460_046,
            "extraction": 468_460_046 + 500_000 * round_number + 1000 * 128,
            "consolidation": 505_209_463 + 10_000_000 * (round_number - 1),
        }
        return count_up(first[split], 1000)
    stream = ("held_out",) if split == "held_out" else (split, round_number)
    return (derive_seed(run_seed, "map", *stream, index) for index in count_up())


def _maps(env: EnvironmentConfig) -> str:
    """Describe the wanted maps in words."""
    wanted = f" and solutions of {env.min_solution} to {env.max_turns} moves" if env.min_solution else ""
    return f"{env.id} with {env.params}{wanted}"


def episode(name: str, round_number: int, split: Split, env: EnvironmentConfig, seed: int, map_hash: str) -> Episode:
    """Build the game of a seed, under a unique id."""
    return Episode(
        id=name, round=round_number, split=split, env=env.id, params=env.params, seed=seed, map_hash=map_hash
    )
