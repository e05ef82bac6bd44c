"""`python -m benchmarks.extraction`: wall time of K accumulations one after the other / ours, all at once.

Both ways have the same engine, one worker (its start included) and the same games, which are played first, and write
the same knowledge texts: float32 and the same seeds, which is checked. The last line is one JSON object. The process
is the driver of a Ray of its own.
"""

import json
from collections.abc import Sequence
from typing import Any

from benchmarks import harness, serving
from oel_ray.collect.stage import players
from oel_ray.config import RunConfig
from oel_ray.extract.stage import ExtractionWorker, extract
from oel_ray.records import KnowledgeText, Trajectory

import ray  # isort: skip - behind what sets its environment

GOAL = ">= 5"
SIZE = [
    "policy_dtype=float32",
    "engines.dtype=float32",
    "engines.count=1",
    "collect.players=1",
    "extract.seeds=10",
    "extract.workers=1",
]
SMALL = [*SIZE, "extract.seeds=3", "collect.extraction_games=2"]


def one_after_the_other(
    trajectories: Sequence[Trajectory], served: serving.Serving, config: RunConfig
) -> list[KnowledgeText]:
    actor = ray.remote(ExtractionWorker).options(num_cpus=1)
    worker = actor.remote(served.policy, served.pool.client, config)
    try:
        shared = ray.put(list(trajectories))
        seeds = range(config.extract.seeds)
        return [ray.get(worker.accumulate.remote(shared, seed, serving.ROUND)) for seed in seeds]
    finally:
        ray.kill(worker)


def measure(config: RunConfig, runs: int) -> dict[str, Any]:
    """The benchmark's result.

    Raises:
        RuntimeError: the two ways wrote different knowledge.
    """
    games = serving.training_games(config, config.collect.extraction_games)
    with serving.serving(config) as served:
        with players(config, served.policy, served.pool.client) as gamers:
            trajectories = [trajectory for trajectory, _ in gamers.play(games, lambda _: None)]
        written: list[list[KnowledgeText]] = []

        def in_turn() -> float:
            served.fresh()
            return harness.seconds(lambda: written.append(one_after_the_other(trajectories, served, config)), "cpu")

        def ours() -> float:
            served.fresh()
            stage = (trajectories, serving.ROUND, config, served.policy, served.pool.client, lambda *_: None)
            return harness.seconds(lambda: written.append(extract(*stage)), "cpu")

        pairs = harness.measure_pairs(in_turn, ours, runs)
    if any(texts != written[0] for texts in written):
        raise RuntimeError("the accumulations wrote other knowledge one after the other than all at once")
    return harness.result(
        "extraction",
        pairs,
        GOAL,
        harness.machine(served.device),
        unit="s",
        **pairs.medians("one_after_the_other", "ours"),
        accumulations=len(written[0]),
        trajectories=len(trajectories),
        response_tokens=sum(step.response_tokens for text in written[0] for step in text.steps),
    )


def main() -> None:
    options = serving.arguments("extraction", __doc__, runs=2).parse_args()
    config = serving.quickstart(*(SMALL if options.small else SIZE), *options.settings)
    print(json.dumps(measure(config, options.runs)))


if __name__ == "__main__":
    main()
