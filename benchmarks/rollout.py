"""`python -m benchmarks.rollout`: tokens per second through players, routing and engines / through plain vLLM.

The plain side is vLLM's `LLM.generate` with the prompts that our players sent, all at once, and the lengths that came
back, forced; with the same arguments, sampling and seeds. It waits for no game and has no turns. Beside it,
`without_games`: the same requests, all at once, to the engine that players use, which tells vLLM's server from our
players. The last line is one JSON object. The process is the driver of a Ray of its own.

`--sweep` measures simulated engines instead of real ones, for what a few cores cannot carry; see `rollout_sweep`.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness, serving
from oel_ray.config.schema import RunConfig
from oel_ray.play.players import Game, Players, player_pool
from oel_ray.records import Sampling, Trajectory

GOAL = ">= 0.95"
FIGURES = Path(__file__).parent / "figures"
SIZE = ["engines.count=1", "engines.max_num_seqs=16", "collect.players=1", "collect.seats=24"]
SMALL = [*SIZE, "engines.max_num_seqs=4", "collect.seats=4"]
EPISODES_PER_SEAT, EPISODES_PER_SEAT_SMALL = 10, 2


def measure(config: RunConfig, episodes_per_seat: int, runs: int) -> dict[str, Any]:
    """The benchmark's result."""
    seats = config.collect.players * config.collect.seats
    games = serving.training_games(config, seats * episodes_per_seat)
    sampling = config.collect.sampling.sampling()
    with (
        serving.serving(config) as served,
        serving.plain_engines(config.engines, served.policy, on_gpu=served.on_gpu) as plain,
        player_pool(config, served.policy, served.pool.client) as gamers,
    ):
        play(served, gamers, games[:seats])  # warms up
        ours, theirs, at_once = [], [], []
        for run in range(runs):
            seconds, trajectories = play(served, gamers, games)
            tokens = serving.response_tokens(trajectories)
            requests = serving.requests_of([(game, 0) for game in trajectories], config.seed)
            ours.append(tokens / seconds)
            theirs.append(tokens / serving.write_again(plain, requests, sampling))
            at_once.append(tokens / ask(served, requests, sampling))
            serving.tell(f"run {run}: ours {ours[-1]:.0f}, plain {theirs[-1]:.0f}, at once {at_once[-1]:.0f} tokens/s")
    pairs = harness.Pairs(tuple(ours), tuple(theirs))
    return harness.result(
        "rollout",
        pairs,
        GOAL,
        harness.machine(served.device),
        unit="tokens/s",
        **pairs.medians("ours", "plain", digits=1),
        without_games=round(median(at_once), 1),
        episodes=len(games),
        seats=seats,
        tokens=tokens,
        turns=len(requests),
        engines=config.engines.count,
        max_num_seqs=config.engines.max_num_seqs,
    )


def play(served: serving.Serving, gamers: Players, games: list[Game]) -> tuple[float, list[Trajectory]]:
    """Seconds for some games with empty prefix caches, and the games."""
    served.fresh()
    started = time.perf_counter()
    played = gamers.play(games, lambda _: None)
    return time.perf_counter() - started, [trajectory for trajectory, _ in played]


def ask(served: serving.Serving, requests: Sequence[serving.Request], sampling: Sampling) -> float:
    """Seconds until the pool has answered all requests, with empty prefix caches; the seeds give the same responses."""
    served.fresh()

    async def all_of_them() -> None:
        client = served.pool.client
        asked = (client(it.prompt_ids, sampling, seed=it.seed, key=str(n)) for n, it in enumerate(requests))
        await asyncio.gather(*asked)

    started = time.perf_counter()
    asyncio.run(all_of_them())
    return time.perf_counter() - started


def main() -> None:
    parser = serving.arguments("rollout", __doc__, runs=3)
    parser.add_argument("--sweep", action="store_true", help="simulated engines of many sizes, with a figure")
    parser.add_argument("--out", type=Path, default=FIGURES, help="the folder for the figure")
    options = parser.parse_args()
    if options.sweep:
        from benchmarks import rollout_sweep

        print(json.dumps(rollout_sweep.measure(options.out, options.settings, small=options.small)))
        return
    config = serving.quickstart(*(SMALL if options.small else SIZE), *options.settings)
    per_seat = EPISODES_PER_SEAT_SMALL if options.small else EPISODES_PER_SEAT
    print(json.dumps(measure(config, per_seat, options.runs)))


if __name__ == "__main__":
    main()
