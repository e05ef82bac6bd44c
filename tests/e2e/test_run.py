"""The whole job as a user starts it: real Ray, real vLLM, real DeepSpeed on two ranks, a model of random weights."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

SMALL = [
    "rounds=1",
    "thinking=false",
    "env.params.size=3",
    "env.params.num_holes=2",
    "env.max_turns=4",
    "collect.extraction_games=3",
    "collect.sampling.max_tokens=8",
    "extract.format=unstructured",
    "extract.show_previous=true",
    "extract.seeds=2",
    "extract.max_tokens=64",
    "extract.sampling.max_tokens=24",
    "consolidate.steps=2",
    "consolidate.keep_steps=[1]",
    "consolidate.games_per_step=2",
    "consolidate.learning_rate=1e-3",
    "consolidate.sampling.max_tokens=8",
    "evaluate.maps=3",
    "evaluate.seeds=2",
    "evaluate.sampling.max_tokens=8",
    "engines.count=1",
]
MARK = "OEL_RAY_TEST_RUN_OF"
KILLS = [
    "0:prepare", "0:evaluate:2-done", "1:collect:1-done", "1:extract:moved",
    "1:evaluate_in_context:5-done", "1:consolidate:moved", "1:evaluate:1-done",
]  # fmt: skip


def another_day() -> str:
    """A time zone of the day before or after that of TZ."""
    hours = int(os.environ["TZ"].removeprefix("NOON"))
    return f"DAY{hours + (24 if hours < 0 else -24):+d}"


def oel(*arguments: str, kill_after: str | None = None, tz: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, MARK: str(os.getpid())} | ({"OEL_RAY_KILL_AFTER": kill_after} if kill_after else {})
    environment |= {"TZ": tz} if tz else {}
    command = [sys.executable, "-m", "oel_ray", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


def texts(folder: Path) -> dict[str, bytes]:
    """The artifacts of a run that are text, apart from those that tell the time."""
    timed = {"MANIFEST.json", "metrics.jsonl", "status.json", "run.json", "config.yaml"}
    files = [path for path in folder.rglob("*") if path.suffix in {".jsonl", ".json"} and path.name not in timed]
    left_out = {"policy", "policies", "quarantine"}
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if not left_out & {*path.parts}}


def test_the_run_folder_holds_every_promised_file_and_passes_verify(undisturbed: Path) -> None:
    verified = oel("verify", str(undisturbed), "--replay")
    assert verified.returncode == 0, verified.stdout
    expected = {
        "rounds/000/evaluation.json",
        "rounds/000/evaluation.jsonl",
        "rounds/001/trajectories/extraction.jsonl",
        "rounds/001/trajectories/consolidation.jsonl",
        "rounds/001/knowledge/seed-00.json",
        "rounds/001/knowledge/seed-01.json",
        "rounds/001/in_context.jsonl",
        "rounds/001/consolidation/samples.jsonl",
        "rounds/001/evaluation.json",
        "rounds/001/evaluation.jsonl",
    }
    assert set(texts(undisturbed)) == expected
    evaluation = json.loads((undisturbed / "rounds/001/evaluation.json").read_text())
    assert evaluation["games"] == 6
    assert evaluation["oracle"] > evaluation["random"]
    stages = {row["stage"]: row for row in map(json.loads, (undisturbed / "metrics.jsonl").read_text().splitlines())}
    assert {row["engine_restarts"] for row in stages.values()} == {0}
    assert all(row["failures"] == {} for row in stages.values())
    assert stages["collect"]["requests"] >= 7
    assert 0 < stages["collect"]["prefix_cache_hit_rate"] < 1


def test_the_policy_changed_and_loads_in_plain_transformers(undisturbed: Path, model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, kept = undisturbed / "rounds/001/policy", undisturbed / "rounds/001/policies/0001"
    folders = (model, kept, policy)
    before, between, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders)
    assert before.keys() == between.keys() == after.keys()
    for ours, theirs in itertools.pairwise((before, between, after)):
        assert any((ours[name] != theirs[name]).any() for name in ours)
    assert AutoTokenizer.from_pretrained(policy).chat_template
    assert AutoTokenizer.from_pretrained(kept).chat_template


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_inside_and_between_stages_it_goes_on_to_the_same_bytes(
    undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    """Also proves that the same run twice is the same run: this one shares nothing with the first but its settings."""
    folder = tmp_path / "killed"
    before = {process.pid for process in psutil.process_iter()}
    committed: set[str] = set()
    for number, kill in enumerate(KILLS):
        start = ["--resume"] if number else ["exact", f"model={model}", *SMALL]
        killed = oel("run", *start, "--run-dir", str(folder), kill_after=kill, tz=another_day() if number else None)
        assert killed.returncode == -signal.SIGKILL, (kill, killed.stderr)
        done = stages(folder)
        assert committed <= set(done), "a committed stage was lost"
        committed = set(done)
    finished = oel("run", "--resume", "--run-dir", str(folder))
    assert finished.returncode == 0, finished.stderr

    assert texts(folder) == texts(undisturbed)
    assert {name: entry["counts"] for name, entry in stages(folder).items()} == {
        name: entry["counts"] for name, entry in stages(undisturbed).items()
    }
    assert oel("verify", str(folder), "--replay").returncode == 0
    assert not left_over(before)


@pytest.mark.slow
@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT] * 2])
@pytest.mark.parametrize("at", ["000/.work-evaluate/games.jsonl", "001/.work-extract/steps-00.jsonl"])
def test_stopped_by_signals_it_goes_on_to_the_same_bytes(
    undisturbed: Path, model: Path, tmp_path: Path, signals: list[signal.Signals], at: str
) -> None:
    folder = tmp_path / "stopped"
    before = {process.pid for process in psutil.process_iter()}
    command = [sys.executable, "-m", "oel_ray", "run", "exact", f"model={model}", *SMALL, "--run-dir", str(folder)]
    environment = {**os.environ, MARK: str(os.getpid())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (folder / "rounds" / at).exists():
        time.sleep(0.01)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert not left_over(before)
    assert oel("run", "--resume", "--run-dir", str(folder)).returncode == 0
    assert texts(folder) == texts(undisturbed)
    assert oel("verify", str(folder), "--replay").returncode == 0


@pytest.mark.slow
def test_stages_by_hand_on_files_of_another_run_give_the_same_bytes(
    undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    """Games and knowledge are all that extraction and consolidation read; no environment is there to be asked.

    One line of the games is bad, and costs nothing but itself.
    """
    given, folder = undisturbed / "rounds/001", tmp_path / "run"
    settings = ["--config", "exact", f"model={model}", *SMALL, "evaluate.enabled=false", "env.id=Elsewhere-v0"]
    (tmp_path / "games.jsonl").write_bytes(b"oops\n" + (given / "trajectories/extraction.jsonl").read_bytes())
    games = ["--trajectories", str(tmp_path / "games.jsonl"), "--max-bad", "0.5"]
    extracted = oel("extract", str(folder), *settings, *games)
    assert extracted.returncode == 0, extracted.stderr
    assert "bad lines left out: 1, with the reasons in" in extracted.stderr
    games = ["--trajectories", str(given / "trajectories/consolidation.jsonl")]
    consolidated = oel("consolidate", str(folder), *games)
    assert consolidated.returncode == 0, consolidated.stderr
    for name in ("knowledge/seed-00.json", "knowledge/seed-01.json", "consolidation/samples.jsonl"):
        assert (folder / "rounds/001" / name).read_bytes() == (given / name).read_bytes()
    weights = [(path / "policy/model.safetensors").read_bytes() for path in (folder / "rounds/001", given)]
    assert weights[0] == weights[1]
    again = oel("extract", str(folder), *settings)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    finished = oel("run", "--resume", "--run-dir", str(folder))
    assert finished.returncode == 0, finished.stderr
    assert oel("verify", str(folder), "--replay").returncode == 0


def stages(folder: Path) -> dict[str, dict[str, Any]]:
    manifests = [json.loads(path.read_text()) for path in sorted(folder.glob("rounds/*/MANIFEST.json"))]
    return {f"{m['round']}:{name}": entry for m in manifests for name, entry in m["stages"].items()}


def left_over(before: set[int]) -> list[psutil.Process]:
    """Processes of a run that are still there two minutes after it.

    Ray's agents end a moment after the driver; those that were just starting look for its server for a minute first.
    """
    ours = [process for process in psutil.process_iter() if process.pid not in before and is_ours(process)]
    left: list[psutil.Process] = psutil.wait_procs(ours, timeout=120)[1]
    return left


def is_ours(process: psutil.Process) -> bool:
    """Whether a process of a run is one of these tests'. Those that lost their variables count as ours."""
    try:
        title = " ".join(process.cmdline()) or process.name()
        mark = process.environ().get(MARK, str(os.getpid()))
    except psutil.Error:
        return False
    named = any(word in title for word in ("ray::", "raylet", "gcs_server", "VLLM::", "oel_ray"))
    return named and mark == str(os.getpid())
