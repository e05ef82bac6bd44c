"""`python -m experiments.worlds MODEL`: a micro model on boards with other letters than the game's, told what they are.

Run as a script, in a process of its own, on a CPU, in transformers alone.
"""

import argparse
import random
from pathlib import Path

from examples.micro_model.evaluate import Model, knowledge, play
from examples.micro_model.worlds import REAL, World, worlds
from experiments.measure import Measured
from oel_ray.runs.files import write_json

MAPS = 128


def unseen() -> list[World]:
    """Worlds whose pair of letters the micro model was not trained on, and neither of whose letters the game has."""
    return [world for world in worlds("held_out") if not {*world} & {*REAL}]


def measure(folder: Path, maps: int, seed: int) -> Measured:
    """The share of games won, one on each of so many maps, all in other worlds."""
    rng = random.Random(seed)
    games = [(world, number, knowledge("all", world, rng)) for number, world in enumerate(rng.sample(unseen(), maps))]
    finished, length = play(Model(folder, seed=seed), games)
    return Measured.of_shares(sum(game.won for game in finished), maps, length)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.worlds", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="the folder of a micro model")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--maps", type=int, default=MAPS, help="games, one each on a map and in a world of its own")
    parser.add_argument("--seed", type=int, default=0, help="of worlds and responses")
    options = parser.parse_args()
    write_json(options.out, measure(options.model, options.maps, options.seed).model_dump())


if __name__ == "__main__":
    main()
