"""Which games a run plays, fixed before any is played. Runs in the driver; builds environments, plays none.

Maps are told apart by content, not by seed: two seeds often draw the same board.
"""

from collections.abc import Iterator
from itertools import count as count_up

from oel_ray.envs.registry import make
from oel_ray.errors import UserError
from oel_ray.records import Episode, Params, Split, TrainingSplit
from oel_ray.seeds import derive_seed

# Draws in a row that may bring nothing new before the environment counts as exhausted.
_PATIENCE = 1000

_LETTERS: dict[TrainingSplit, str] = {"extraction": "x", "consolidation": "c"}


def held_out_episodes(env: str, params: Params, run_seed: int, maps: int) -> list[Episode]:
    """Games on `maps` distinct maps, for evaluation alone; the same in every round.

    Raises:
        UserError: the environment has fewer distinct maps.
    """
    episodes: list[Episode] = []
    seen: set[str] = set()
    fruitless = 0
    for seed, map_hash in _draws(env, params, run_seed, "held_out"):
        if len(episodes) == maps:
            break
        if map_hash not in seen:
            seen.add(map_hash)
            episodes.append(_episode(f"h-{len(episodes):04d}", 0, "held_out", env, params, seed, map_hash))
            fruitless = 0
        elif (fruitless := fruitless + 1) == _PATIENCE:
            raise UserError(
                f"{env} with {params} has only {len(seen)} distinct maps, and {maps} are to be held out: "
                f"lower evaluate.maps below {len(seen)}, so that maps are left to learn on"
            )
    return episodes


def training_episodes(
    env: str,
    params: Params,
    run_seed: int,
    round_number: int,
    split: TrainingSplit,
    count: int,
    excluded: set[str],
) -> list[Episode]:
    """`count` games of one round to learn from, on maps whose hashes are not in `excluded`; maps may repeat.

    Raises:
        UserError: every map that the environment draws is excluded.
    """
    episodes: list[Episode] = []
    found: set[str] = set()
    fruitless = 0
    for seed, map_hash in _draws(env, params, run_seed, split, round_number):
        if len(episodes) == count:
            break
        found.add(map_hash)
        if map_hash not in excluded:
            name = f"r{round_number:03d}-{_LETTERS[split]}-{len(episodes):04d}"
            episodes.append(_episode(name, round_number, split, env, params, seed, map_hash))
            fruitless = 0
        elif (fruitless := fruitless + 1) == _PATIENCE:
            raise UserError(
                f"{env} with {params} leaves no map to learn on: {len(found)} distinct maps were found and "
                f"{len(found & excluded)} of them are held out: lower evaluate.maps"
            )
    return episodes


def _draws(env: str, params: Params, run_seed: int, *stream: str | int) -> Iterator[tuple[int, str]]:
    for index in count_up():
        seed = derive_seed(run_seed, "map", *stream, index)
        yield seed, make(env, seed, params).map_hash


def _episode(
    name: str,
    round_number: int,
    split: Split,
    env: str,
    params: Params,
    seed: int,
    map_hash: str,
) -> Episode:
    return Episode(id=name, round=round_number, split=split, env=env, params=params, seed=seed, map_hash=map_hash)
