"""The driver is killed at random moments, wherever the run then is, and the run ends as if nothing had been."""

import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from oel_ray.faults import POINTS_FILE
from tests.e2e.test_run import MARK, SMALL, another_day, left_over, oel, stages, texts

KILLS = int(os.environ.get("OEL_RAY_KILLS", "3"))
KILLS_OF_A_RUN = 3
SEED = 166


def outcome(folder: Path) -> dict[str, bytes]:
    """All artifacts. The attempt that a weight version names tells of the kills, and of nothing else."""
    files = texts(folder) | {"policy": (folder / "rounds/001/policy/model.safetensors").read_bytes()}
    return {name: re.sub(rb'("r\d+\.s\d+)\.a\d+"', rb'\1"', content) for name, content in files.items()}


def run_until_it_ends(folder: Path, model: Path, moments: random.Random, most: int, start: float, work: float) -> int:
    """A run that is killed up to `most` times, each time within the seconds it still wants; returns how often.

    Undisturbed it wants `start` seconds, which every attempt wants again, and `work` seconds.
    """
    settings = ["exact", f"model={model}", *SMALL, "consolidate.checkpoint_every=1"]
    kills, committed = 0, set[str]()
    while True:
        of_what = ["--resume"] if (folder / "run.json").exists() else settings
        command = [sys.executable, "-m", "oel_ray", "run", *of_what, "--run-dir", str(folder)]
        moment = moments.uniform(0, start + work)
        with Path(f"{folder}.log").open("ab") as log:
            environment = {**os.environ, MARK: str(os.getpid()), POINTS_FILE: f"{folder}.points"}
            if "--resume" in of_what:
                environment["TZ"] = another_day()
            driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            code = driver.wait(moment if kills < most else 400)
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.wait()
            assert kills < most, f"a run that nobody disturbs does not end: {folder}.log"
            kills += 1
            work -= max(0, moment - start)
        else:
            assert code == 0, Path(f"{folder}.log").read_text()
            return kills
        assert committed <= set(stages(folder)), "a committed stage was lost"
        committed = set(stages(folder))


def assert_no_more_is_done_twice_than_was_in_hand(points: list[str], kills: int) -> None:
    """Nothing that had ended: what a kill costs is a game for each seat, a step of each chain, and an optimizer step.

    The driver counts games and steps of chains as they end, rank 0 optimizer steps as they begin.
    """
    ended = Counter(point for point in points if point.endswith("-done") and ":consolidate:" not in point)
    assert {point.split(":")[1] for point in ended} == {"evaluate", "collect", "extract", "evaluate_in_context"}
    for point, times in ended.items():
        assert times <= (2 if ":extract:" in point else 1), f"{point} {times} times"  # two chains
    begun = Counter(found[0] for point in points if (found := re.match(r"\d:consolidate:\d+:rank-0", point)))
    assert len(begun) == 2
    assert sum(begun.values()) - len(begun) <= kills, begun  # a checkpoint for every step


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kills", [KILLS, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(
    timed: tuple[Path, float], model: Path, tmp_path: Path, kills: int
) -> None:
    """As many runs as it takes. Bytes are equal as the preset is `exact`; ids and counts would be in any case."""
    undisturbed, seconds = timed
    work = sum(entry["wall_s"] for entry in stages(undisturbed).values())
    before = {process.pid for process in psutil.process_iter()}
    moments, fired, runs = random.Random(SEED), 0, 0
    while fired < kills:
        folder = tmp_path / f"run-{runs}"
        most = min(kills - fired, KILLS_OF_A_RUN)
        now = run_until_it_ends(folder, model, moments, most, seconds - work, work)
        fired, runs = fired + now, runs + 1
        assert_no_more_is_done_twice_than_was_in_hand(Path(f"{folder}.points").read_text().splitlines(), now)
        assert outcome(folder) == outcome(undisturbed)
        counts = [{name: entry["counts"] for name, entry in stages(run).items()} for run in (folder, undisturbed)]
        assert counts[0] == counts[1]
        verified = oel("verify", str(folder), "--replay")
        assert verified.returncode == 0, verified.stdout
        assert not list(folder.rglob("step-*")), "checkpoints are gone once the stage is committed"
    print(f"{fired} kills in {runs} runs")
    again = oel("run", "--resume", "--run-dir", str(folder))
    assert again.returncode == 0, again.stderr
    assert "evaluate" not in again.stderr, "a finished run did something again"
    assert not left_over(before)
