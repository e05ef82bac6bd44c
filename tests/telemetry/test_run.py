"""What is told of stages and steps, without Ray: the driver's own files and what tracks the run."""

import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
from rich.console import Console

from oel_ray.records import StepRow
from oel_ray.runs.files import write_json
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.layout import COLLECT, EVALUATE
from oel_ray.runs.stage import Stage
from oel_ray.telemetry.progress import Progress
from oel_ray.telemetry.run import Telemetry
from tests.support.example_run import RATES, small_config

STEP = StepRow(
    step=0, loss=0.1, kl_per_token=0.1, learning_rate=1e-6, sync_bytes=64, tokens=10, generated_by="", weight_version=""
)


def step(number: int, **other: Any) -> StepRow:
    return STEP.model_copy(update={"step": number, **other})


class Told:
    """A telemetry over a pool that counts as it is told, and all that it says."""

    def __init__(self, folder: RunFolder) -> None:
        self.counts: Counter[str] = Counter(engine_restarts=2, prompt_tokens=100, cached_tokens=100)
        self.failures: dict[str, int] = {}
        self.at: list[tuple[int, str]] = []
        self.tracked: list[tuple[str, dict[str, Any], int]] = []
        self.said = io.StringIO()
        pool = SimpleNamespace(
            enter=lambda *where: self.at.append(where),
            counts=self.counts.copy,
        )
        players = SimpleNamespace(pop_failures=lambda: self.failures)
        progress = Progress(console=Console(file=self.said))
        track: Any = lambda group, row, step: self.tracked.append((group, dict(row), step))  # noqa: E731
        self.telemetry = Telemetry(folder, progress, pool, players, track)  # type: ignore[arg-type]


def rows(folder: RunFolder) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in (folder.path / "metrics.jsonl").read_bytes().splitlines()]


def test_a_stage_is_tracked_when_it_is_committed(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", small_config()) as folder:
        told, stage = Told(folder), Stage(folder, 1, COLLECT)
        with told.telemetry.stage(stage):
            told.counts.update(engine_restarts=1, prompt_tokens=100, cached_tokens=50, requests=7)
            told.failures = {"an environment hung": 3}
            stage.begin()
            stage.commit([], {"extraction": 5})
        (row,) = rows(folder)
    assert row.items() >= {"round": 1, "stage": "collect", "extraction": 5, "requests": 7, "engine_restarts": 1}.items()
    assert (row["prefix_cache_hit_rate"], row["failures"]) == (0.5, {"an environment hung": 3})
    assert told.tracked == [("collect", row, 1)]
    assert told.at == [(1, "collect")]
    assert told.said.getvalue() == "went wrong and was made good: 1 x engines replaced, 3 x an environment hung\n"


def test_a_stage_that_is_not_committed_is_not_tracked(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", small_config()) as folder:
        told = Told(folder)
        with told.telemetry.stage(Stage(folder, 1, COLLECT)):
            told.failures = {"an environment hung": 3}
        assert not (folder.path / "metrics.jsonl").exists()
    assert (told.tracked, told.said.getvalue()) == ([], "")


def test_an_evaluation_is_tracked_with_its_rates(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", small_config()) as folder:
        told, stage = Told(folder), Stage(folder, 2, EVALUATE)
        with told.telemetry.stage(stage):
            write_json(stage.begin().evaluation, RATES | {"in_context": None})
            stage.commit([stage.out.evaluation], {})
        assert rows(folder)[0]["pass_rate"] == 0.75
    ((group, row, step),) = told.tracked
    assert (group, row["pass_rate"], row["stage"], step) == ("evaluate", 0.75, "evaluate", 2)


def test_training_steps_have_one_axis_over_all_rounds(tmp_path: Path) -> None:
    told = Told(RunFolder(tmp_path))
    with told.telemetry.progress.stage(2, 2, "consolidate", 5, "steps") as progress:
        told.telemetry.trained(progress, 2, 5, 1, "KL 0.1", [])
        told.telemetry.trained(progress, 2, 5, 3, "KL 0.1", [step(1), step(2)])
        assert (progress.done, progress.total) == (3, 5)
        assert progress.eta_s is not None and progress.eta_s >= 0
    assert [(group, step) for group, _, step in told.tracked] == [("training", 6), ("training", 7)]


def test_a_skipped_step_is_reported_once(tmp_path: Path) -> None:
    told = Told(RunFolder(tmp_path))
    skipped = step(1, kl_per_token=None, learning_rate=0.0, applied=False)
    with told.telemetry.progress.stage(2, 2, "consolidate", 5, "steps") as progress:
        told.telemetry.trained(progress, 2, 5, 2, "KL not finite", [step(0), skipped])
        told.telemetry.trained(progress, 2, 5, 3, "KL 0.1", [step(2)])
    notes = [line for line in told.said.getvalue().splitlines() if "skipped" in line]
    assert notes == ["round 2: step 1 skipped: loss or gradient not finite"]
