"""Report stages and training steps of a run to its files, Ray's metrics and the trackers. Runs in the driver.

Each number is reported once, at the place where it is recorded. `oel_ray.telemetry.series` lists the metrics.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from oel_ray.records import StepRow
from oel_ray.runs.files import read_json
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.layout import EVALUATE
from oel_ray.runs.stage import Stage
from oel_ray.telemetry.progress import Progress, StageProgress
from oel_ray.telemetry.series import Series, enter, report
from oel_ray.telemetry.trackers import Track

Row = dict[str, Any]


class CountsRequests(Protocol):
    """The part of the engine pool that telemetry uses; see `oel_ray.engines.client.Pool`."""

    def enter(self, round_number: int, stage: str) -> None: ...
    def counts(self) -> Counter[str]: ...


class CountsFailures(Protocol):
    """The part of the players that telemetry uses; see `oel_ray.play.players.Players`."""

    def pop_failures(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Telemetry:
    """The reports on the stages and steps of one run."""

    folder: RunFolder
    progress: Progress
    pool: CountsRequests
    players: CountsFailures
    track: Track

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Report on a stage inside the block.

        If it was committed at the end, write its metrics and report its failures.
        """
        self.progress.on_status = progressed
        enter(stage.round, stage.name)
        self.pool.enter(stage.round, stage.name)
        before = self.pool.counts()
        yield
        if not (entry := stage.entry):
            return
        counts, failures = self.pool.counts(), self.players.pop_failures()
        counts.subtract(before)
        engines = {"engines replaced": counts["engine_restarts"], "requests moved": counts["requests_moved"]}
        if told := [f"{times} x {what}" for what, times in (engines | failures).items() if times]:
            self.progress.note(f"went wrong and was made good: {', '.join(told)}")
        hit_rate = round(counts["cached_tokens"] / max(counts["prompt_tokens"], 1), 4)
        row: Row = {"round": stage.round, "stage": stage.name, "wall_s": entry.wall_s, **entry.counts, **counts}
        row |= {"prefix_cache_hit_rate": hit_rate, "failures": failures}
        if stage.name == EVALUATE:
            row |= read_json(self.folder.files(stage.round).evaluation)
            row["deployed"] = self.folder.deployed(stage.round + 1)
            report(Series.PASS_RATE, row["pass_rate"])
        self.folder.log_metrics(row)
        self.track(stage.name, row, stage.round)

    def serves(self, round_number: int, step: int = 0) -> None:
        """Record that the engines serve the weights of this step, or with 0 the policy that the round ended with."""
        report(Series.WEIGHT_ROUND, round_number, round="", stage="")
        report(Series.WEIGHT_STEP, step, round="", stage="")

    def trained(
        self, progress: StageProgress, number: int, steps: int, done: int, text: str, rows: list[StepRow]
    ) -> None:
        """Report that `done` steps of a round are done, with the metrics of the steps since the last call."""
        progress.update(done, text)
        for row in rows:
            report(Series.KL_PER_TOKEN, row.kl_per_token)
            report(Series.GRAD_NORM, row.grad_norm)
            report(Series.LEARNING_RATE, row.learning_rate)
            report(Series.SYNC_BYTES, row.sync_bytes)
            report(Series.STEP_SECONDS, row.seconds_generate, phase="generate")
            report(Series.STEP_SECONDS, row.seconds_train, phase="train")
            report(Series.STEP_SECONDS, row.seconds_sync, phase="sync")
            report(Series.TRAINED_TOKENS, row.tokens / max(row.seconds_train, 1e-9))
            if not row.applied:
                report(Series.SKIPPED_STEPS, 1)
                self.progress.note(f"round {number}: step {row.step} skipped: loss or gradient not finite")
            if row.sync_bytes:
                self.serves(number, row.step + 1)
            self.track("training", row.model_dump(), (number - 1) * steps + row.step)


def progressed(stage: StageProgress) -> None:
    """Report the progress of a stage."""
    report(Series.STAGE_PROGRESS, stage.done / max(stage.total, 1))
    report(Series.STAGE_ETA, stage.eta_s)
