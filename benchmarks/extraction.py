"""`python -m benchmarks.extraction`: wall time of K accumulations one after the other / ours, all at once.

Both ways have the same engine, one worker (with its start, `start_s`) and the same games, which are played first, and
write the same knowledge texts: float32 and the same seeds, which is checked. What is gained depends on how much slower
an engine gets with the size of its batch; so the responses are also said again, with their lengths, by a simulated
engine that hardly gets slower (`simulated`). The last line is one JSON object. The process is the driver of a Ray of
its own.
"""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import harness, serving
from benchmarks.simulated import Reply, Simulation, simulated
from oel_ray.config.schema import RunConfig
from oel_ray.extract.stage import ExtractionWorker, extract
from oel_ray.play.players import player_pool
from oel_ray.records import KnowledgeText, Trajectory
from oel_ray.text import prompts
from oel_ray.text.chat import THINK_CLOSE

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


def one_after_the_other(trajectories: Sequence[Trajectory], served: serving.Serving) -> list[KnowledgeText]:
    worker = _worker(served)
    try:
        shared = ray.put(list(trajectories))
        seeds = range(served.config.extract.seeds)
        return [ray.get(worker.accumulate.remote(shared, seed, serving.ROUND)) for seed in seeds]
    finally:
        ray.kill(worker)


def _worker(served: serving.Serving) -> Any:
    return ray.remote(ExtractionWorker).options(num_cpus=1).remote(served.policy, served.pool.client, served.config)


def start_s(served: serving.Serving) -> float:
    """Seconds until a worker answers, which both ways have once."""
    started = time.perf_counter()
    worker = _worker(served)
    ray.get(worker.progress.remote())
    ray.kill(worker)
    return time.perf_counter() - started


def measure(config: RunConfig, runs: int) -> dict[str, Any]:
    """The benchmark's result."""
    games = serving.training_games(config, config.collect.extraction_games)
    with serving.serving(config) as served:
        with player_pool(config, served.policy, served.pool.client) as gamers:
            trajectories = [trajectory for trajectory, _ in gamers.play(games, lambda _: None)]
        pairs, texts = _pairs(trajectories, served, runs)
        start = start_s(served)
    simulation = Simulation(tuple(_replies(texts, config)))
    with serving.serving(config, engine=simulated(simulation)) as pretended:
        quick, _ = _pairs(trajectories, pretended, runs)
    return harness.result(
        "extraction",
        pairs,
        GOAL,
        harness.machine(served.device),
        unit="s",
        **pairs.medians("one_after_the_other", "ours"),
        start_s=round(start, 3),
        accumulations=len(texts),
        trajectories=len(trajectories),
        response_tokens=sum(step.response_tokens for text in texts for step in text.steps),
        simulated=serving.simulated_result(quick, simulation, "one_after_the_other", "ours"),
    )


def _pairs(
    trajectories: Sequence[Trajectory], served: serving.Serving, runs: int
) -> tuple[harness.Pairs, list[KnowledgeText]]:
    """Both ways, side by side, and what they wrote.

    Raises:
        RuntimeError: the two ways wrote different knowledge.
    """
    config, written = served.config, list[list[KnowledgeText]]()

    def in_turn() -> float:
        served.fresh()
        return harness.seconds(lambda: written.append(one_after_the_other(trajectories, served)), "cpu")

    def ours() -> float:
        served.fresh()
        stage = (trajectories, serving.ROUND, config, served.policy, served.pool.client, lambda *_: None)
        return harness.seconds(lambda: written.append(extract(*stage)), "cpu")

    pairs = harness.measure_pairs(in_turn, ours, runs)
    if any(texts != written[0] for texts in written):
        raise RuntimeError("the accumulations wrote other knowledge one after the other than all at once")
    return pairs, written[0]


def _replies(texts: Sequence[KnowledgeText], config: RunConfig) -> Iterator[Reply]:
    """What extraction steps added, as responses of their recorded lengths."""
    thought = THINK_CLOSE if config.thinking else ""
    for step in (step for text in texts for step in text.steps if step.response_tokens):
        items = "\n".join(f"{prompts.ITEM_MARKER} {item}" for item in step.added)
        yield Reply(thought + items, (0,) * step.response_tokens)


def main() -> None:
    options = serving.arguments("extraction", __doc__, runs=2).parse_args()
    config = serving.quickstart(*(SMALL if options.small else SIZE), *options.settings)
    print(json.dumps(measure(config, options.runs)))


if __name__ == "__main__":
    main()
