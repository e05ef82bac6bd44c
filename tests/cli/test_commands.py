"""The command line: how runs end, and nothing heavy for `--help`. Mistakes have a test file of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oel_ray.runs.folder import RunFolder
from oel_ray.views.verify import verify
from tests.support import example_run

pytestmark = pytest.mark.process

FAKE_LOOP = """
import os, sys, time, types
from oel_ray.errors import RunFailed
from tests.support.example_run import run_stages
loop = types.ModuleType("oel_ray.loop")
def run(config, folder, progress):
    mode = os.environ["LOOP"]
    progress.note("the loop began")
    if mode == "fails":
        raise RunFailed("no engine\\nanswers")
    if mode == "hangs":
        time.sleep(60)
    if mode == "drains":
        from oel_ray.stopping import draining
        with draining() as drain:
            progress.note("games are in play")
            while not drain.asked:
                time.sleep(0.05)
            time.sleep(0.5)
            progress.note("games have ended")
    run_stages(folder)
loop.run = run
preflight = types.ModuleType("oel_ray.preflight")
preflight.preflight = preflight.preflight_resumed = lambda what, note: types.SimpleNamespace(auto=None)
sys.modules["oel_ray.preflight"] = preflight
import oel_ray
oel_ray.loop = sys.modules["oel_ray.loop"] = loop
replay = types.ModuleType("oel_ray.envs.replay")
replay.replay = lambda game: (game.success and game.round < 2, "")
sys.modules["oel_ray.envs"] = types.ModuleType("oel_ray.envs")
sys.modules["oel_ray.envs.replay"] = replay
from oel_ray.cli.main import main
main()
"""


SECRET = "hf_canary"
SIZES = (
    "12 stages in rounds 0 to 2; a round: 5 games to learn from, 4 extractions, at most 9 training samples, "
    "24 evaluation games\n"
)


def start(folder: Path, *arguments: str, loop: str = "works") -> subprocess.Popen[str]:
    """`oel` with a loop that needs no engine, and no model that would have to be checked."""
    return subprocess.Popen(
        [sys.executable, "-c", FAKE_LOOP, *arguments],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LOOP": loop, "COLUMNS": "80", "HF_TOKEN": SECRET},
    )


def oel(folder: Path, *arguments: str, loop: str = "works") -> tuple[int, str, str]:
    process = start(folder, *arguments, loop=loop)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "game.yaml").write_text(example_run.small_config().to_yaml())
    return tmp_path


def test_a_run_ends_with_its_table(folder: Path) -> None:
    code, output, errors = oel(folder, "run", "game.yaml", "rounds=1")
    assert code == 0, errors
    (run,) = (folder / "runs").iterdir()
    assert run.name.startswith("game-20")
    assert "75.0±14.4" in output
    assert f"oel report runs/{run.name}\n" in output
    assert f"oel verify runs/{run.name} --replay" in output
    written = [path.read_text() for path in run.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert not [text for text in [*written, output, errors] if SECRET in text]
    begun = SIZES.replace("12 stages in rounds 0 to 2", "7 stages in rounds 0 to 1") + "the loop began\n"
    assert errors == begun
    code, output, errors = oel(folder, "run", "--resume", "--run-dir", f"runs/{run.name}")
    assert (code, errors) == (0, begun)
    assert oel(folder, "verify", str(run))[:2] == (0, f"{run}: every promise holds\n")
    code, output, _ = oel(folder, "show", str(run), "r001-k00")
    assert (code, "EXPERIENCE ITEM" in output) == (0, True)


def test_a_failed_run_says_how_to_go_on(folder: Path) -> None:
    code, output, errors = oel(folder, "run", "game.yaml", "--run-dir", "my run", loop="fails")
    assert (code, output) == (1, "")
    assert errors.splitlines()[2:] == [
        "oel: run failed: no engine answers; the run is in my run; go on with: oel run --resume --run-dir 'my run'"
    ]
    assert oel(folder, "run", "--resume", "--run-dir", "my run")[0] == 0


def test_one_command_starts_a_run_and_goes_on_with_it(folder: Path) -> None:
    job = ("run", "game.yaml", "--run-dir", "run", "--resume")
    assert oel(folder, *job, loop="fails")[0] == 1
    began = RunFolder(folder / "run").run_id
    code, output, errors = oel(folder, *job)
    assert (code, "75.0±14.4" in output) == (0, True), errors
    assert RunFolder(folder / "run").run_id == began


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_can_be_resumed(folder: Path, number: signal.Signals) -> None:
    process = start(folder, "run", "game.yaml", "--run-dir", "run", loop="hangs")
    assert process.stderr
    assert process.stderr.readline() == SIZES
    assert process.stderr.readline() == "the loop began\n"
    time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "oel: interrupted: the run is in run; go on with: oel run --resume --run-dir run\n"
    assert not (folder / "run" / "lock.json").exists()
    assert oel(folder, "run", "game.yaml", "--resume", "--run-dir", "run")[0] == 0
    code, _, errors = oel(folder, "run", "game.yaml", "rounds=3", "--resume", "--run-dir", "run")
    assert code == 2
    assert "rounds: 2 -> 3" in errors


@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_games_in_play_end_after_one_signal_and_are_dropped_after_two(
    folder: Path, number: signal.Signals, times: int
) -> None:
    process = start(folder, "run", "game.yaml", "--run-dir", "run", loop="drains")
    assert process.stderr
    while process.stderr.readline() != "games are in play\n":
        pass
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.2)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.startswith("oel: stopping: what has begun may end, for at most 30 s; once more to stop at once\n")
    assert ("games have ended" in errors) == (times == 1)
    assert errors.endswith("oel: interrupted: the run is in run; go on with: oel run --resume --run-dir run\n")
    assert not (folder / "run" / "lock.json").exists()
    assert oel(folder, "run", "--resume", "--run-dir", "run")[0] == 0
    assert verify(folder / "run") == []


def test_rounds_that_are_taken_back_are_done_again(folder: Path) -> None:
    run = example_run.build(folder / "run")
    before = (run / "rounds/002/evaluation.json").read_bytes()
    asked = start(folder, "rollback", "run", "--to-round", "1")
    output, errors = asked.communicate("n\n", timeout=60)
    told = "rounds 2 to 2 leave the run for run/quarantine; round 2 then starts anew, from the policy of round 1\n"
    assert (asked.returncode, errors) == (130, "oel: interrupted\n")
    assert output.startswith(told)
    assert verify(run) == [] and (run / "rounds/002").exists()
    assert oel(folder, "rollback", "run", "--to-round", "1", "--yes") == (0, told, "")
    (kept,) = (run / "quarantine").glob("*/rounds/002/evaluation.json")
    assert kept.read_bytes() == before
    assert RunFolder(run).rounds() == [0, 1]
    assert verify(run) == []
    assert oel(folder, "rollback", "run", "--to-round", "1", "--yes")[0] == 2
    changed = ("consolidate.learning_rate=0.5", "--allow-config-change")
    code, _, errors = oel(folder, "run", "game.yaml", "--resume", "--run-dir", "run", *changed)
    assert code == 0, errors
    assert RunFolder(run).rounds() == [0, 1, 2]
    code, output, _ = oel(folder, "verify", "run")
    assert (code, output.splitlines()[0]) == (0, "run: every promise holds")
    assert "changed from collect of round 2 on: consolidate.learning_rate: 1e-06 -> 0.5" in output
    assert "changed from collect of round 2 on" in oel(folder, "show", "run")[1]


def test_verify_lists_what_is_broken(folder: Path) -> None:
    run = example_run.build(folder / "run")
    code, output, _ = oel(folder, "verify", "run", "--replay")
    assert code == 1
    assert "rounds/002/evaluation.jsonl:1: r002-p-h-0000-s0 says success=True, its replay gives False" in output
    RunFolder(run).files(1).in_context.unlink()
    code, output, errors = oel(folder, "verify", "run")
    assert code == 1
    assert "rounds/001/in_context.jsonl: is missing\n" in output
    assert errors.count("\n") == 1


def test_config_prints_what_it_resolves_to(folder: Path) -> None:
    code, output, _ = oel(folder, "config", "game.yaml", "consolidate.steps=7")
    assert code == 0
    (folder / "again.yaml").write_text(output)
    assert oel(folder, "config", "again.yaml")[1] == output
    assert "# games        T = 2 and T' = 7 a round, 18 in all\n" in output


def test_commands_that_only_print_import_no_heavy_library() -> None:
    heavy = "{'ray', 'torch', 'vllm', 'transformers', 'deepspeed', 'textarena', 'matplotlib', 'jinja2'}"
    modules = "oel_ray.cli.main, oel_ray.cluster.session, oel_ray.runs.folder, oel_ray.views.report.page"
    modules += ", oel_ray.views.verify, oel_ray.views.show"
    code = f"import sys, {modules}; print({heavy} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout == "set()\n"


@pytest.mark.parametrize(("arguments", "said"), [("--help", "Commands:"), ("config quickstart", "# tokens")])
def test_commands_that_only_print_end_within_seconds(arguments: str, said: str) -> None:
    times = []
    for _ in range(3):
        began = time.monotonic()
        command = [sys.executable, "-m", "oel_ray", *arguments.split()]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        times.append(time.monotonic() - began)
        assert said in answer.stdout
    assert min(times) < 1.5, times
