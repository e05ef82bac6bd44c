"""Run the extraction stage: K concurrent accumulations, spread over Ray actors. `extract` runs in the driver."""

from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from oel_ray.cluster.actors import failure
from oel_ray.cluster.demand import ray_options
from oel_ray.cluster.stacks import WATCH, Named
from oel_ray.config.schema import RunConfig
from oel_ray.errors import RunFailed
from oel_ray.extract.chain import accumulate
from oel_ray.records import AccumulationStep, Experience, Frame, Generate, KnowledgeText
from oel_ray.runs.journal import Journal
from oel_ray.runs.layout import EXTRACT
from oel_ray.stopping import draining
from oel_ray.telemetry.series import Series, enter, log, report
from oel_ray.text.chat import ChatFormat

_POLL_S = 0.5
_LIVES = {"max_restarts": 3, "max_task_retries": -1}
"""Ray restarts a worker that dies, on another node if its own is gone, and retries its calls."""


class ExtractionWorker(Named):
    """An async Ray actor that runs any number of accumulations as coroutines and answers `progress` in between."""

    def __init__(self, policy: Path, generate: Generate, config: RunConfig, frame: Frame | None = None) -> None:
        self._chat = ChatFormat.from_pretrained(policy, thinking=config.thinking, frame=frame)
        self._generate = generate
        self._config = config
        self._finished_steps = 0
        self._stopping = False

    async def accumulate(
        self,
        trajectories: Sequence[Experience],
        seed_index: int,
        round_number: int,
        journal: Journal[AccumulationStep] | None = None,
    ) -> KnowledgeText:
        """Run one accumulation. It resumes after the steps in the journal and appends its own.

        If this process dies, Ray repeats the call on the next one, which finds the further steps in the file.
        """
        journal = journal and journal.read_again()
        known = list(journal.records) if journal else []
        self._finished_steps += len(known)

        enter(round_number, EXTRACT)

        def on_step(step: AccumulationStep) -> None:
            for outcome, count in {"accepted": len(step.added), **step.rejected}.items():
                report(Series.KNOWLEDGE_ITEMS, count, outcome=outcome)
            log.info("accumulation %d took step %d: %s", seed_index, step.index, step.status)
            if journal:
                journal.append(step)
            self._finished_steps += 1
            if self._stopping:
                raise RunFailed("the accumulation was asked to stop")

        job = trajectories, seed_index, round_number, self._config, self._chat, self._generate
        return await accumulate(*job, known=known, on_step=on_step)

    async def progress(self) -> int:
        """Count the steps finished so far, over all accumulations of this worker."""
        return self._finished_steps

    async def stop(self) -> None:
        """End every accumulation after its current step."""
        self._stopping = True


def extract(
    trajectories: Sequence[Experience],
    round_number: int,
    config: RunConfig,
    policy: Path,
    generate: Generate,
    on_progress: Callable[[int, int], None],
    journal: Callable[[str, type[AccumulationStep]], Journal[AccumulationStep]] | None = None,
    frame: Frame | None = None,
) -> list[KnowledgeText]:
    """Run all accumulations of a round. Returns their texts in the order of their seeds.

    `on_progress(finished steps, all steps)` is called about twice a second, whether or not a step has finished. With
    `journal`, which opens a journal by name, accumulations resume after its last step. `frame` is the run's own, see
    `ChatFormat`.

    Raises:
        RunFailed: an accumulation failed; the others are cancelled.
        KeyboardInterrupt: the run was asked to stop. Steps that have begun may end first, see `draining`.
    """
    chains = config.extract.seeds
    total = chains * len(trajectories)
    workers: list[Any] = []
    journals = [journal(f"steps-{seed:02d}.jsonl", AccumulationStep) if journal else None for seed in range(chains)]
    for known in filter(None, journals):
        unbroken = takewhile(lambda step: step[0] == step[1].index, enumerate(known.records))
        known.cut(len(list(unbroken)))
    try:
        resources = ray_options(config.extract.resources)
        settings = {"concurrency_groups": {WATCH: 1}, "max_concurrency": chains + 1, **_LIVES, **resources}
        actor = ray.remote(**settings)(ExtractionWorker)
        for index in range(min(config.extract.workers, chains)):
            named = actor.options(name=f"extractor-{round_number}-{index}")
            workers.append(named.remote(policy, generate, config, frame))
        shared = ray.put(list(trajectories))
        seeds = {
            workers[seed % len(workers)].accumulate.remote(shared, seed, round_number, journals[seed]): seed
            for seed in range(chains)
        }
        texts: dict[int, KnowledgeText] = {}
        waiting, finished_steps = list(seeds), 0
        with draining() as drain:
            while waiting and not drain.over:
                if drain.asked:
                    for worker in workers:
                        worker.stop.remote()
                ready, waiting = ray.wait(waiting, timeout=_POLL_S)
                # Accumulations that were asked to stop return no text; their steps are in the journals.
                for reference in ready if not drain.asked else []:
                    texts[seeds[reference]] = _result(reference, seeds[reference])
                finished_steps = _finished_steps(workers, finished_steps)
                on_progress(finished_steps, total)
        return [texts[seed] for seed in range(chains)]
    finally:
        for worker in workers:
            ray.kill(worker)


def _finished_steps(workers: list[Any], before: int) -> int:
    try:
        return sum(ray.get([worker.progress.remote() for worker in workers], timeout=_POLL_S))
    except RayError:  # the worker is still starting, or dead; then its accumulations fail in a moment
        return before


def _result(reference: Any, seed: int) -> KnowledgeText:
    try:
        result: KnowledgeText = ray.get(reference)  # ready
        return result
    except RayError as error:
        raise RunFailed(f"extraction seed {seed} failed: {failure(error)}") from error
