"""A run folder on a file system that is really full: it says so, and goes on once there is room."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from oel_ray.errors import RunFailed
from oel_ray.records import AccumulationStep
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.journal import Journal
from oel_ray.runs.stage import Stage
from oel_ray.views.verify import verify
from tests.support import example_run

pytestmark = pytest.mark.process


@contextmanager
def mounted(place: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of so many bytes; without the right to mount one the test is skipped."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        pytest.skip(f"no file system can be mounted here: {ended.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "1m") as place:
        yield place


def fill(disk: Path, but: int) -> Path:
    """Leave about so many bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    with filler.open("r+b") as file:
        file.truncate(max(filler.stat().st_size - but, 0))
    return filler


@pytest.mark.parametrize("room", [0, 5 * 4096])
def test_a_run_on_a_full_disk_ends_with_the_missing_bytes_and_resumes_once_there_is_room(disk: Path, room: int) -> None:
    path = disk / "run"
    with RunFolder.create(path, example_run.small_config()) as folder:
        example_run.prepare(Stage(folder, 0, "prepare"), Path("base-model"))
    said = rf"^the disk is full: \d+ bytes are free in {path}$"
    filler = disk / "filler"
    with pytest.raises(RunFailed, match=said), RunFolder.resume(path, None) as folder:
        filler = fill(disk, room)
        done = example_run.run_stages(folder)
        pytest.fail(f"there was room for {done}")
    assert verify(path) == []
    filler.unlink()
    with RunFolder.resume(path, None) as folder:
        assert example_run.run_stages(folder)
    assert verify(path) == []


def test_a_line_that_did_not_fit_on_the_disk_is_put_aside(disk: Path) -> None:
    def journal() -> Journal[AccumulationStep]:
        return Journal(disk / "steps.jsonl", AccumulationStep, disk / "quarantine/steps.jsonl", "test")

    step = example_run.knowledge_text(1, 0).steps[0]
    writer, filler = journal(), fill(disk, 3 * 4096)
    with pytest.raises(RunFailed, match=r"cannot write to .*: No space left on device, \d+ bytes are free"):
        for _ in range(1000):
            writer.append(step)
    filler.unlink()
    again = journal()
    assert again.records == writer.records != []
    again.append(step)
    assert journal().records == [*writer.records, step]
