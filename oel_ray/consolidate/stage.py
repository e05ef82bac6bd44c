"""The consolidation stage: one Ray Train run per round. `consolidate` runs in the driver."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import orjson
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from oel_ray.consolidate.job import Job
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
        _train,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=job.on_gpu,
            resources_per_worker={"CPU": TRAINER_CPUS} | ({"GPU": 1} if job.on_gpu else {}),
        ),
        run_config=ray.train.RunConfig(name=name, storage_path=str(scratch.resolve())),
        torch_config=TorchConfig(backend="nccl" if job.on_gpu else "gloo"),
    )
    running = _in_thread(trainer.fit)
    while not running.done():
        wait([running], timeout=_POLL_S)
        rows = _rows(job.metrics)
        on_progress(len(rows), f"KL {rows[-1]['kl_per_token']:.4f}" if rows else "")
    if error := running.exception():
        raise RunFailed(f"consolidation: {_reason(error)}") from error
    rows = _rows(job.metrics)
    if len(rows) != len(job.plan):
        raise RunFailed(f"consolidation ended after {len(rows)} of {len(job.plan)} steps")
    return sum(row["samples"] for row in rows)


def _in_thread(work: Callable[[], Any]) -> "Future[Any]":
    """Start `work` in a daemon thread: an interrupted driver reports and ends without waiting for `fit`."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised again where the future is read
            future.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    return future


def _train(settings: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker. Torch and DeepSpeed are imported there, not in the driver."""
    from oel_ray.consolidate.worker import train

    train(settings["job"])


def _rows(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file that is being written."""
    if not path.exists():
        return []
    return [orjson.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def _reason(error: BaseException) -> str:
    """The first rank's own error; the others mostly say that they lost it."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {0: error}
    rank, cause = min(failures.items(), key=lambda item: ("HealthCheck" in type(item[1]).__name__, item[0]))
    return f"rank {rank}: {one_line(cause, 0)}"
