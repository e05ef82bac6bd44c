"""Run the consolidation stage, one Ray Train run per round. `consolidate` runs in the driver."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from oel_ray.cluster.demand import rank_takes
from oel_ray.cluster.stacks import dump_stacks
from oel_ray.consolidate.checkpoints import NOTES_FILE, prepare
from oel_ray.consolidate.job import Job
from oel_ray.errors import EngineUnavailable, RunFailed, UserError, one_line
from oel_ray.faults import fault_point
from oel_ray.formats import as_text
from oel_ray.records import StepRow

_POLL_S = 0.5


Progressed = Callable[[int, str, list[StepRow]], None]


def consolidate(job: Job, name: str, on_progress: Progressed, note: Callable[[str], None]) -> int:
    """Train, and write the new policy. Returns the number of training samples.

    Resumes from the newest undamaged checkpoint of this job in its scratch folder. `on_progress(steps done, text,
    metrics of the steps since the last call)` is called about twice a second. `note` is called with messages for the
    user.

    Raises:
        RunFailed: a training rank failed with an error that a restart would repeat, or ranks died too often; the
            message is the rank's error.
    """
    config = job.config.consolidate
    attempt, said = prepare(job)
    if said:
        note(said)
    trainer = TorchTrainer(
        _train,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=job.on_gpu,
            resources_per_worker=rank_takes(config, on_gpu=job.on_gpu),
        ),
        run_config=ray.train.RunConfig(
            # A new name for every driver, because ranks of a killed driver may still write under its name.
            name=f"{name}-attempt-{attempt}",
            storage_path=str(job.scratch.resolve()),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            callbacks=[_OwnErrorsEnd()],
        ),
        torch_config=TorchConfig(backend="nccl" if job.on_gpu else "gloo"),
    )
    running = _in_thread(trainer.fit)
    told, done = 0, len(_rows(job.metrics))
    while not running.done():
        wait([running], timeout=_POLL_S)
        rows, notes = _rows(job.metrics), _lines(job.scratch / NOTES_FILE)
        on_progress(len(rows), f"KL {as_text(rows[-1].kl_per_token, '.4f')}" if rows else "", rows[done:])
        for line in notes[told:]:
            note(line.decode())
        for step in range(done, len(rows)):
            fault_point(f"{job.round}:consolidate:{step}-done")
        told, done = len(notes), len(rows)
    if error := running.exception():
        raise RunFailed(f"consolidation: {_reason(error)}") from error
    rows = _rows(job.metrics)
    if len(rows) != len(job.plan):
        raise RunFailed(f"consolidation ended after {len(rows)} of {len(job.plan)} steps")
    return sum(row.samples for row in rows)


def _in_thread(work: Callable[[], Any]) -> "Future[Any]":
    """Start `work` in a daemon thread, so that an interrupted driver reports and ends without waiting for `fit`."""
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

    try:
        train(settings["job"])
    except Exception as error:
        if "timed out" in str(error).lower():  # the wording of Ray and torch for calls and collectives
            dump_stacks(f"rank-{ray.train.get_context().get_world_rank()}")
        raise


def _rows(path: Path) -> list[StepRow]:
    return [StepRow.from_json(line) for line in _lines(path)]


def _lines(path: Path) -> list[bytes]:
    """Read the complete lines of a file that is being written."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


class _OwnErrorsEnd(ray.train.UserCallback):
    """End the run after an error of our own code, because a restart would repeat it.

    Ray Train would restart the ranks after any error, but it ends a run whose callback raises.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, error in sorted(worker_exceptions.items()):
            if isinstance(error, UserError | RunFailed) and not isinstance(error, EngineUnavailable):
                raise RunFailed(f"rank {rank}: {one_line(error, 0)}")


def _reason(error: BaseException) -> str:
    """Find the error of the lowest rank that failed by itself. Other ranks mostly report that they lost it."""
    if isinstance(ours := getattr(error, "controller_failure", None), RunFailed):
        return str(ours)
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    if not failures:
        return one_line(error, 0)
    rank, cause = min(failures.items(), key=lambda item: ("HealthCheck" in type(item[1]).__name__, item[0]))
    return f"rank {rank}: {one_line(cause, 0)}"
