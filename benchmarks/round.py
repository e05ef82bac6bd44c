"""`python -m benchmarks.round`: wall time of a round / the engine and trainer work in it that nothing can spare.

A run of one round is made as `oel run` makes it; the wall time is that of its stages, from what they are given to what
they commit, without the start of Ray and engines, which a run has once. The unavoidable work is, stage by stage, the
time in which as many plain vLLM engines write responses of the recorded lengths to the recorded prompts, all at once
(of a consolidation step at once, since the weights change behind it), and the time that the training ranks compute.
Weight syncs, loading, files and processes all count as ours. The last line is one JSON object.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from benchmarks import harness, serving
from oel_ray import loop
from oel_ray.cluster.session import ray_cluster
from oel_ray.config.schema import RunConfig
from oel_ray.consolidate.prefixes import prefixes
from oel_ray.extract.chain import extraction_prompt_ids
from oel_ray.extract.items import text_after
from oel_ray.records import EvaluationGame, KnowledgeText, Sampling, Trajectory, read_jsonl
from oel_ray.runs import layout
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.layout import RoundFiles
from oel_ray.seeds import derive_seed
from oel_ray.telemetry.progress import Progress
from oel_ray.text.chat import ChatFormat

GOAL = "<= 1.15"
SIZE = ["rounds=1", "evaluate.maps=64"]
SMALL = [
    *SIZE,
    "engines.count=1",
    "engines.max_num_seqs=8",
    "collect.players=1",
    "collect.seats=8",
    "collect.extraction_games=2",
    "extract.seeds=1",
    "consolidate.workers=1",
    "consolidate.steps=1",
    "consolidate.games_per_step=2",
    "evaluate.maps=2",
    "evaluate.seeds=1",
]


class Wave(NamedTuple):
    """Requests of a stage that might all be answered at once."""

    stage: str
    requests: list[serving.Request]
    sampling: Sampling


class RecordedRound:
    """What a committed round asked of its engines, put together again from its files."""

    def __init__(self, config: RunConfig, files: RoundFiles, policy: Path) -> None:
        self._config, self._files = config, files
        self._chat = ChatFormat.from_pretrained(policy, thinking=config.thinking)
        self._extraction = read_jsonl(files.trajectories("extraction"), Trajectory)
        self._consolidation = read_jsonl(files.trajectories("consolidation"), Trajectory)

    def waves(self) -> Iterator[Wave]:
        config = self._config
        played = [(game, 0) for game in (*self._extraction, *self._consolidation)]
        yield self._games(layout.COLLECT, played, config.collect.sampling.sampling())
        yield Wave(layout.EXTRACT, list(self._extractions()), config.extract.sampling.sampling())
        for stage, path in (
            (layout.EVALUATE_IN_CONTEXT, self._files.in_context),
            (layout.EVALUATE, self._files.evaluation_games),
        ):
            if path.exists():
                games = [(game, game.sampling_seed) for game in read_jsonl(path, EvaluationGame)]
                yield self._games(stage, games, config.evaluate.sampling.sampling())
        for requests in self._steps():
            yield Wave(layout.CONSOLIDATE, requests, config.consolidate.sampling.sampling())

    def _games(self, stage: str, games: Sequence[tuple[Trajectory, int]], sampling: Sampling) -> Wave:
        return Wave(stage, serving.requests_of(games, self._config.seed), sampling)

    def _extractions(self) -> Iterator[serving.Request]:
        config, read = self._config, {game.id: game for game in self._extraction}
        for path in self._files.knowledge_files():
            knowledge = KnowledgeText.from_json(path.read_bytes())
            for step in knowledge.steps:
                before = text_after(knowledge, step.index).text
                ids = extraction_prompt_ids(
                    read[step.trajectory_id], before, config.extract, self._chat, config.engines.max_model_len
                )
                if ids and step.response_tokens:
                    seed = derive_seed(config.seed, "extract", knowledge.round, knowledge.seed, step.index)
                    yield serving.Request(ids, seed, step.response_tokens)

    def _steps(self) -> Iterator[list[serving.Request]]:
        prompts = {prefix.id: prefix.prompt_ids for prefix in prefixes(self._consolidation, self._chat)}
        rows = [orjson.loads(line) for line in self._files.samples.read_bytes().splitlines()]
        for step, samples in groupby(rows, key=lambda row: row["step"]):
            yield [
                serving.Request(
                    prompts[row["prefix_id"]],
                    derive_seed(self._config.seed, "consolidate", serving.ROUND, step, row["prefix_id"]),
                    len(row["response_ids"]),
                )
                for row in samples
            ]

    def trainer_seconds(self) -> float:
        rows = [orjson.loads(line) for line in self._files.consolidation_metrics.read_bytes().splitlines()]
        return float(sum(row["seconds_train"] for row in rows))


def run_a_round(config: RunConfig, path: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of every stage of a round, and of the unavoidable work in it."""
    with RunFolder.create(path, config) as folder:
        loop.run(config, folder, Progress(folder))
        walls = {name: entry.wall_s for name, entry in folder.manifest(serving.ROUND).stages.items()}
        recorded = RecordedRound(config, folder.files(serving.ROUND), folder.policy(0))
        work = dict.fromkeys(walls, 0.0)
        with (
            ray_cluster(config, folder.run_id, serving.tell) as on_gpu,
            serving.plain_engines(config.engines, folder.policy(0), on_gpu=on_gpu) as plain,
        ):
            for wave in recorded.waves():
                work[wave.stage] += serving.write_again(plain, wave.requests, wave.sampling)
        work[layout.CONSOLIDATE] += recorded.trainer_seconds()
        return walls, work


def measure(config: RunConfig, runs: int) -> dict[str, Any]:
    """The benchmark's result."""
    walls, works = [], []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            wall, work = run_a_round(config, Path(folder) / "run")
            walls.append(wall)
            works.append(work)
    pairs = harness.Pairs(tuple(sum(wall.values()) for wall in walls), tuple(sum(work.values()) for work in works))
    return harness.result(
        "round",
        pairs,
        GOAL,
        harness.machine("cpu" if config.engines.device == "cpu" else "cuda"),
        unit="s",
        stages=[
            {name: {"wall": round(wall[name], 2), "work": round(work[name], 2)} for name in wall}
            for wall, work in zip(walls, works, strict=True)
        ],
        engines=config.engines.count,
        ranks=config.consolidate.workers,
    )


def main() -> None:
    options = serving.arguments("round", __doc__, runs=1).parse_args()
    config = serving.quickstart(*(SMALL if options.small else SIZE), *options.settings)
    print(json.dumps(measure(config, options.runs)))


if __name__ == "__main__":
    main()
