"""`python -m benchmarks.collectors`: games per second of 8 player actors / 8 times those of one.

The games are real, the engine is simulated: a response takes as long in a full batch as alone, and as many as come are
written at once, so that only players, pool and driver could be in the way. Counted are the games that end while all
seats are taken: how long the last ones take depends on which they are, not on who plays them. The last line is one JSON
object. The process is the driver of a Ray of its own.
"""

import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import harness, serving
from benchmarks.simulated import Simulation, simulated
from oel_ray.config.schema import RunConfig
from oel_ray.models.resolve import resolve_model
from oel_ray.play.players import Game, Players, player_pool

import ray  # isort: skip - behind what sets its environment

GOAL = ">= 0.9"
SIZE = ["engines.count=1", "collect.players=8", "collect.seats=4", "engines.max_num_seqs=1024"]
SMALL = [*SIZE, "collect.players=2", "collect.seats=2"]
GAMES_PER_SEAT, GAMES_PER_SEAT_SMALL = 10, 2


def measure(config: RunConfig, games_per_seat: int, runs: int) -> dict[str, Any]:
    """The benchmark's result."""
    collect = config.collect
    policy = resolve_model(config.model, serving.tell)
    simulation = Simulation(
        serving.move_replies(config, policy), decode_sequence_s=0.0, prefill_tokens_per_s=float("inf")
    )
    games = serving.training_games(config, collect.players * collect.seats * games_per_seat)
    with (
        serving.serving(config, engine=simulated(simulation)) as served,
        player_pool(config, served.policy, served.pool.client) as every,
    ):
        one = some_players(1, collect.seats)
        every.play(games[: collect.players], lambda _: None)  # warms up

        def per_second(gamers: Players, games: Sequence[Game]) -> float:
            started, ended = time.perf_counter(), list[float]()
            gamers.play(games, lambda _: None, lambda *_: ended.append(time.perf_counter()))
            counted = len(games) - len(gamers.actors) * gamers.seats
            return counted / (ended[counted - 1] - started)

        share = itertools.cycle(range(collect.players))
        pairs = harness.measure_pairs(
            lambda: per_second(every, games),
            # The same games, dealt out as among all: one player's share, another one's each time.
            lambda: collect.players * per_second(one, games[next(share) :: collect.players]),
            runs,
        )
    return harness.result(
        "collectors",
        pairs,
        GOAL,
        harness.machine("cpu"),
        unit="games/s",
        **pairs.medians("all", "one_times_players"),
        players=collect.players,
        seats=collect.seats,
        games=len(games),
        decode_step_s=simulation.decode_step_s,
    )


def some_players(actors: int, seats: int) -> Players:
    """A part of the players that run, by the names that they have in Ray."""
    return Players([ray.get_actor(f"player-{index}") for index in range(actors)], seats)


def main() -> None:
    options = serving.arguments("collectors", __doc__, runs=3).parse_args()
    config = serving.quickstart(*(SMALL if options.small else SIZE), *options.settings)
    per_seat = GAMES_PER_SEAT_SMALL if options.small else GAMES_PER_SEAT
    print(json.dumps(measure(config, per_seat, options.runs)))


if __name__ == "__main__":
    main()
