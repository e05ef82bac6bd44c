"""A disk that fills up in the middle of a consolidation: the checkpoints that are there are gone on from."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.test_run import MARK, SMALL, oel
from tests.runs.test_full_disk import fill, mounted

SETTINGS = [*SMALL, "consolidate.steps=6", "consolidate.checkpoint_every=2", "evaluate.in_context=false"]
ROOM = 2**21
"""For lines, and for no checkpoint."""


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_costs_no_step_before_it(model: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "400m") as disk:
        folder, log = disk / "run", tmp_path / "log"
        command = [sys.executable, "-m", "oel_ray", "run", "exact", f"model={model}", *SETTINGS]
        with log.open("wb") as output:
            driver = subprocess.Popen(
                [*command, "--run-dir", str(folder)],
                env={**os.environ, MARK: str(os.getpid())},
                stdout=output,
                stderr=output,
            )
        while driver.poll() is None and not list(folder.glob("rounds/001/.work-consolidate/ray_train/*/step-0002")):
            time.sleep(0.01)
        filler = fill(disk, ROOM)
        assert driver.wait(300) == 1, log.read_text()
        assert "go on with: oel run --resume" in log.read_text()
        verified = oel("verify", str(folder))
        assert verified.returncode == 0, verified.stdout
        filler.unlink()
        ended = oel("run", "--resume", "--run-dir", str(folder))
        assert ended.returncode == 0, ended.stderr
        assert "after step 2 of 6" in ended.stderr or "after step 4 of 6" in ended.stderr
        verified = oel("verify", str(folder), "--replay")
        assert verified.returncode == 0, verified.stdout
