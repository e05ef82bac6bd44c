"""Scalars get into TensorBoard's files, and whatever W&B does, the run does not notice."""

import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from tensorboardX.proto.event_pb2 import Event

from oel_ray.config.schema import RunConfig
from oel_ray.telemetry import trackers as tracking


def written(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of all scalars in the event files of a folder."""
    scalars: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


def events(folder: Path) -> Iterator[Event]:
    for file in sorted(folder.glob("events.*")):
        content, at = file.read_bytes(), 0
        while at < len(content):  # length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", content, at)
            yield Event.FromString(content[at + 12 : at + 12 + length])
            at += length + 16


def run_of(kind: Literal["tensorboard", "wandb"], folder: Path) -> list[str]:
    """Track a few scalars as a run does; what the user is told."""
    notes: list[str] = []
    with tracking.tracking(RunConfig(tracking=kind), "0a1b", folder, notes.append) as track:
        for step in range(3):
            track("training", {"step": step, "kl_per_token": 0.5 / (step + 1), "weight_version": "r001"}, step)
        track("collect", {"round": 1, "wall_s": 2.5, "failures": {"hung": 1}, "kl": None}, 1)
    return notes


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The source of a package wandb, to be written."""
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    module = tmp_path / "packages" / "wandb.py"
    module.parent.mkdir()
    return module


def test_scalars_are_in_the_event_files(tmp_path: Path) -> None:
    assert run_of("tensorboard", tmp_path) == []
    scalars = written(tmp_path / "tensorboard")
    assert scalars["training/kl_per_token"] == [(0, 0.5), (1, 0.25), (2, pytest.approx(0.5 / 3))]
    assert scalars["collect/wall_s"] == [(1, 2.5)]
    assert scalars.keys() == {"training/step", "training/kl_per_token", "collect/round", "collect/wall_s"}


def test_wandb_gets_the_same_scalars_as_tensorboard(tmp_path: Path, wandb: Path) -> None:
    wandb.write_text(
        "import contextlib, json\n"
        "class Run:\n"
        "    def __init__(self, file): self.file = file\n"
        "    def log(self, scalars): print(json.dumps(scalars), file=self.file)\n"
        "@contextlib.contextmanager\n"
        "def init(*, id, name, dir, config, resume):\n"
        "    assert (id, resume, config['rounds']) == ('0a1b', 'allow', 2)\n"
        "    with open(dir / 'wandb.jsonl', 'w') as file: yield Run(file)\n"
    )
    assert run_of("wandb", tmp_path) == []
    lines = (tmp_path / "wandb.jsonl").read_text().splitlines()
    assert lines[0] == '{"training/step": 0, "training/kl_per_token": 0.5, "training/at": 0}'
    assert lines[3] == '{"collect/round": 1, "collect/wall_s": 2.5, "collect/at": 1}'
    assert written(tmp_path / "tensorboard")["collect/wall_s"] == [(1, 2.5)]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "ModuleNotFoundError: No module named 'wandb'"),
        ("raise OSError('half installed')", "OSError: half installed"),
        ("def init(**_): raise ConnectionError('no route')", "ConnectionError: no route"),
        (
            "import contextlib\n"
            "class Run:\n"
            "    def log(self, scalars): raise TimeoutError('no answer')\n"
            "init = lambda **_: contextlib.nullcontext(Run())\n",
            "TimeoutError: no answer",
        ),
    ],
)
def test_a_failing_wandb_is_reported_once_and_the_run_goes_on(
    tmp_path: Path, wandb: Path, source: str | None, reason: str
) -> None:
    if source is not None:
        wandb.write_text(source)
    assert run_of("wandb", tmp_path) == [f"the run goes on without W&B: {reason}"]
    assert written(tmp_path / "tensorboard")["collect/wall_s"] == [(1, 2.5)]


def test_a_hanging_wandb_does_not_hold_up_the_run(tmp_path: Path, wandb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "LAST_WORDS_S", 0.1)
    wandb.write_text("import time\ndef init(**_): time.sleep(60)\n")
    started = time.monotonic()
    assert run_of("wandb", tmp_path) == []
    assert time.monotonic() - started < 30
