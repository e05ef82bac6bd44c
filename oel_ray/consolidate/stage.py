"""The consolidation stage: one Ray Train run per round. `consolidate` runs in the driver."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import Any

import orjson
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from oel_ray.consolidate.worker import Job, train
from oel_ray.errors import RunFailed, one_line

TRAINER_CPUS = 1
_POLL_S = 0.5


def consolidate(job: Job, name: str, scratch: Path, on_progress: Callable[[int, str], None]) -> int:
    """Train, and write the new policy. Returns the number of training samples.

    `name` must be new for every attempt: Ray Train goes on with an old run of the same name. `scratch` is a folder
    that it may fill. `on_progress(steps done, note)` is called about twice a second.

    Raises:
        RunFailed: a training worker failed; the message is its error.
    """
    config = job.config.consolidate
    trainer = TorchTrainer(
        train,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=job.on_gpu,
            resources_per_worker={"CPU": TRAINER_CPUS} | ({"GPU": 1} if job.on_gpu else {}),
        ),
        run_config=ray.train.RunConfig(name=name, storage_path=str(scratch.resolve())),
        torch_config=TorchConfig(backend="nccl" if job.on_gpu else "gloo"),
    )
    # `fit` blocks; in a thread of its own it leaves the driver free to report and to be interrupted.
    with ThreadPoolExecutor(1, thread_name_prefix="fit") as side:
        running = side.submit(trainer.fit)
        rows: list[dict[str, Any]] = []
        while True:
            try:
                running.result(timeout=_POLL_S)
            except NotYet:
                rows = _rows(job.metrics)
                on_progress(len(rows), f"KL {rows[-1]['kl_per_token']:.4f}" if rows else "")
                continue
            except ray.train.v2.api.exceptions.TrainingFailedError as error:
                raise RunFailed(f"consolidation: {_reason(error)}") from error
            break
    rows = _rows(job.metrics)
    if len(rows) != len(job.plan):
        raise RunFailed(f"consolidation ended after {len(rows)} of {len(job.plan)} steps")
    on_progress(len(rows), f"KL {rows[-1]['kl_per_token']:.4f}")
    return sum(row["samples"] for row in rows)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file that is being written."""
    if not path.exists():
        return []
    return [orjson.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def _reason(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error}
    rank, cause = min(failures.items())
    cause = getattr(cause, "cause", None) or cause.__cause__ or cause
    return f"rank {rank}: {one_line(cause, -1)}"
