"""Progress without a terminal is lines, with one it is bars; the status file follows."""

import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from oel_ray.formats import duration
from oel_ray.runs.files import read_json
from oel_ray.runs.folder import RunFolder
from oel_ray.telemetry.progress import Progress
from tests.support.example_run import small_config


def test_without_a_terminal_a_stage_prints_a_line_at_its_start_each_interval_and_its_end() -> None:
    output = io.StringIO()
    progress = Progress(console=Console(file=output), interval_s=0.4)
    with progress.stage(1, 2, "collect", 64, "games") as stage:
        stage.update(37, note="3 [bold]engines[/bold]")
        time.sleep(1.5)
        progress.note("an engine was restarted")
        stage.update(64)
    lines = output.getvalue().splitlines()
    assert lines[0] == "[round 1/2] collect 0/64 games"
    assert lines[-1] == "[round 1/2] collect 64/64 games, 2 s, done"
    assert lines[-2] == "an engine was restarted"
    between = lines[1:-2]
    assert len(between) >= 3
    pattern = r"\[round 1/2\] collect 37/64 games, \d s, ETA \d s, 3 \[bold\]engines\[/bold\]"
    assert re.fullmatch(pattern, between[-1])


def test_the_last_line_of_a_stage_that_fails_says_stopped() -> None:
    output = io.StringIO()
    with (
        pytest.raises(ValueError, match="boom"),
        Progress(console=Console(file=output)).stage(2, 2, "extract", 8, "steps") as stage,
    ):
        stage.update(3)
        raise ValueError("boom")
    assert output.getvalue().splitlines()[-1] == "[round 2/2] extract 3/8 steps, 0 s, stopped"


def test_a_terminal_gets_a_progress_bar_with_the_note() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100)
    with Progress(console=console).stage(1, 2, "consolidate", 4, "steps") as stage:
        stage.update(4, note="KL 0.31")
    assert "[round 1/2] consolidate 4/4 steps" in output.getvalue()
    assert "━" in output.getvalue()
    assert "KL 0.31" in output.getvalue()


def test_the_status_file_names_the_stage_and_counts_what_is_done(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", small_config()) as folder:
        progress = Progress(folder, Console(file=io.StringIO()))
        with progress.stage(1, 2, "collect", 5, "games") as stage:
            stage.update(5)
        status = read_json(folder.path / "status.json")
        assert {key: status[key] for key in ("state", "round", "stage", "done", "total")} == {
            "state": "running",
            "round": 1,
            "stage": "collect",
            "done": 5,
            "total": 5,
        }


def test_durations_are_printed_in_seconds_then_minutes_then_hours() -> None:
    assert [duration(x) for x in (0.4, 59, 61, 3600 * 2 + 300)] == ["0 s", "59 s", "1 min 01 s", "2 h 05 min"]
