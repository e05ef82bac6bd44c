"""Run folders that older code wrote: they are read, verified, rolled back and gone on with. `make_runs` made them."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from tests.compat.make_runs import FINISHED, IN_COLLECT, IN_EXTRACT, MODEL
from tests.compat.places import RunFolder, app, read_json, write_json

NAMES = [IN_COLLECT, IN_EXTRACT, FINISHED]
WORK_MARK = "/.work-"
WORK = {IN_COLLECT: ".work-collect", IN_EXTRACT: ".work-extract"}
PLAYED = {"prepare", "evaluate"}
LEARNED = {"collect", "extract", "evaluate_in_context", "consolidate", "evaluate"}
COMMITTED = {
    IN_COLLECT: {0: PLAYED, 1: LEARNED, 2: set()},
    IN_EXTRACT: {0: PLAYED, 1: LEARNED, 2: {"collect"}},
    FINISHED: {0: PLAYED, 1: LEARNED, 2: LEARNED},
}
TOLD_BY_TIME = {"status.json", "metrics.jsonl"}
MARKS = {IN_COLLECT: (b'"outcome":"', b'"outcome":"As it was. '), IN_EXTRACT: (b'"added":["', b'"added":["As it was: ')}
"""Put into what a killed run holds, so that it says what no game and no model of this run would say again."""


@pytest.fixture
def run(request: pytest.FixtureRequest, unpacked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unpacked / request.param, tmp_path / "run"))


def oel(*arguments: str | Path) -> str:
    """Run a command that needs no Ray, in this process; returns what it prints."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def resume(run: Path, last: str = "") -> Counter[str]:
    """Go on with a run as a user does; returns how often each fault point was reached.

    The driver is killed as soon as it reaches the `last` of them, if one is named.
    """
    points = run.with_suffix(".points")
    points.touch()
    command = [sys.executable, "-m", "oel_ray", "run", "--resume", "--run-dir", str(run)]
    environment = {**os.environ, "OEL_RAY_POINTS_FILE": str(points), "OEL_RAY_KILL_AFTER": last}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == (-signal.SIGKILL if last else 0), done.stderr
    return Counter(points.read_text().splitlines())


def contents(run: Path) -> dict[str, bytes]:
    """All files of a run but those that tell the time."""
    files = {path.relative_to(run).as_posix(): path for path in run.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in TOLD_BY_TIME}


def layout(run: Path) -> set[str]:
    return {name for name in contents(run) if not name.startswith("tensorboard/")}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def keys(run: Path) -> dict[str, set[frozenset[str]]]:
    """The keys of all JSON that a run holds, apart from its policies."""
    files = [path for path in run.rglob("*.json*") if not {"policies", "tensorboard"} & {*path.relative_to(run).parts}]
    files = [path for path in files if path.parent.name != "policy" or path.name == "policy.json"]
    read = {path: rows(path) if path.suffix == ".jsonl" else [json.loads(path.read_bytes())] for path in files}
    return {path.relative_to(run).as_posix(): {frozenset(row) for row in of_file} for path, of_file in read.items()}


@pytest.mark.parametrize("run", NAMES, indirect=True)
def test_every_promise_of_a_run_folder_holds(run: Path, request: pytest.FixtureRequest) -> None:
    before = contents(run)
    assert RunFolder.open(run).committed == COMMITTED[request.node.callspec.params["run"]]
    assert "every promise holds, every game replayed" in oel("verify", run, "--replay")
    assert contents(run) == before


@pytest.mark.parametrize("run", NAMES, indirect=True)
def test_a_run_folder_is_shown_with_its_games_and_texts(run: Path) -> None:
    before = contents(run)
    overview = oel("show", run)
    assert [line.split()[0] for line in overview.splitlines() if line[:6].strip().isdigit()] == ["0", "1", "2"]
    assert "turn 1: " in oel("show", run, "r001-x-0000")
    assert "not won" in oel("show", run, "r001-p-h-0000-s0")
    assert "from r001-x-0001" in oel("show", run, "r001-k00")
    assert contents(run) == before


@pytest.mark.parametrize("run", NAMES, indirect=True)
def test_what_a_run_folder_has_learned_is_listed_and_compared(run: Path) -> None:
    listed = [line.partition(":")[0] for line in oel("knowledge", run).splitlines()]
    assert listed[:2] == ["r001-k00", "r001-k01"]
    assert oel("knowledge", run, "--diff", *listed[:2])


@pytest.mark.parametrize("run", NAMES, indirect=True)
def test_a_run_folder_becomes_a_page(run: Path) -> None:
    oel("report", run)
    page = (run / "report/report.html").read_text()
    assert "r001-k00" in page and list((run / "report").glob("*.png"))


@pytest.mark.parametrize("run", NAMES, indirect=True)
def test_the_last_round_of_a_run_folder_is_taken_back(run: Path) -> None:
    """The lock of a driver that died, on another machine, is no hindrance."""
    before = contents(run)
    assert "rounds 2 to 2 leave the run" in oel("rollback", run, "--to-round", "1", "--yes")
    assert RunFolder.open(run).rounds() == [0, 1]
    (aside,) = (run / "quarantine").iterdir()
    moved = {f"rounds/{path.relative_to(aside / 'rounds').as_posix()}" for path in (aside / "rounds").rglob("*")}
    after = {name: path for name, path in contents(run).items() if not name.startswith("quarantine/")}
    assert {*before} - {"lock.json"} - moved == {*after}
    assert all(before[name] == content for name, content in after.items())
    assert all((aside / name).read_bytes() == before[name] for name in moved & {*before})
    assert "every promise holds" in oel("verify", run)


def at(run: Path, model: Path) -> None:
    """Let a run whose model lies elsewhere now say so: it names it by an absolute path, in a file with a checksum."""
    policy, manifest = run / "rounds/000/policy/policy.json", run / "rounds/000/MANIFEST.json"
    write_json(policy, read_json(policy) | {"model": str(model)})
    said = read_json(manifest)
    said["stages"]["prepare"]["files"]["policy/policy.json"] = {
        "bytes": policy.stat().st_size,
        "sha256": hashlib.sha256(policy.read_bytes()).hexdigest(),
    }
    write_json(manifest, said)


@pytest.mark.parametrize("run", [FINISHED], indirect=True)
def test_a_run_folder_knows_its_base_model_again(run: Path, unpacked: Path, tmp_path: Path) -> None:
    """As long as a round starts from it."""
    model = Path(shutil.copytree(unpacked / MODEL, tmp_path / "model"))
    at(run, model)
    oel("rollback", run, "--to-round", "0", "--yes")
    folder = RunFolder.open_to_resume(run, None)
    assert folder.frame and folder.frame.after.endswith("</think>\n\n")
    assert folder.policy(folder.deployed(1)) == model
    (model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(Exception, match=r"tokenizer_config\.json: 'f3896bac4a655fbc' -> "):
        RunFolder.open_to_resume(run, None)


@pytest.mark.parametrize("run", [FINISHED], indirect=True)
def test_what_a_game_taught_is_taken_out_of_a_run_folder(run: Path, unpacked: Path) -> None:
    at(run, unpacked / MODEL)
    said = oel("knowledge", run, "--drop", "r001-x-0001")
    assert "to be done again: consolidate of round 1" in said
    assert "nothing of r001-x-0001" in oel("knowledge", run)
    assert "every promise holds" in oel("verify", run)


@pytest.mark.ray
@pytest.mark.timeout(100)
@pytest.mark.parametrize("run", [FINISHED], indirect=True)
def test_a_finished_run_has_nothing_left_to_do(run: Path) -> None:
    before = contents(run)
    assert not resume(run)
    assert contents(run) == before
    assert read_json(run / "status.json")["state"] == "finished"


class Resumed(NamedTuple):
    """A run that was killed and went on to its end."""

    before: Path
    """What it held, with the marks in it."""
    run: Path
    points: Counter[str]
    """How often each fault point was reached on the way."""

    def done(self, stage: str) -> Counter[str]:
        """The fault points behind games, or behind steps of a chain, by how many there are then."""
        return Counter(
            {
                name: times
                for name, times in self.points.items()
                if name.startswith(f"2:{stage}:") and name.endswith("-done")
            }
        )


def go_on(name: str, unpacked: Path, root: Path, last: str = "") -> Resumed:
    """Mark what the journals of a killed run hold, and go on with it."""
    before = Path(shutil.copytree(unpacked / name, root / "before"))
    for journal in (before / "rounds/002" / WORK[name]).glob("*.jsonl"):
        journal.write_bytes(journal.read_bytes().replace(*MARKS[name]))
    run = Path(shutil.copytree(before, root / "run"))
    return Resumed(before, run, resume(run, last))


@pytest.fixture(scope="module")
def resumed(request: pytest.FixtureRequest, unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """A killed run that was gone on with to its end."""
    return go_on(request.param, unpacked, tmp_path_factory.mktemp("resumed"))


@pytest.fixture
def collected(unpacked: Path, tmp_path: Path) -> Resumed:
    """The run that was killed in collect, gone on with until that stage is committed."""
    return go_on(IN_COLLECT, unpacked, tmp_path, last="2:collect")


@pytest.fixture
def extracted(unpacked: Path, tmp_path: Path) -> Resumed:
    """The run that was killed in extract, gone on with until that stage is committed."""
    return go_on(IN_EXTRACT, unpacked, tmp_path, last="2:extract")


@pytest.mark.ray
def test_no_game_that_a_killed_run_holds_is_played_again(collected: Resumed) -> None:
    held = (collected.before / "rounds/002" / WORK[IN_COLLECT] / "games.jsonl").read_bytes().splitlines()
    files = [collected.run / f"rounds/002/trajectories/{split}.jsonl" for split in ("extraction", "consolidation")]
    games = [line for file in files for line in file.read_bytes().splitlines()]
    assert len(held) == 3 and len(games) == 7
    assert all(games.count(game) == 1 and b"As it was. " in game for game in held)
    new = [json.loads(game) for game in games if game not in held]
    assert not {game["id"] for game in new} & {json.loads(game)["id"] for game in held}
    assert collected.done("collect") == Counter(f"2:collect:{number}-done" for number in range(4, 8))


@pytest.mark.ray
def test_no_step_that_a_killed_run_holds_is_done_again(extracted: Resumed) -> None:
    wanted = Counter[str]()
    for seed in range(2):
        journal = extracted.before / "rounds/002" / WORK[IN_EXTRACT] / f"steps-{seed:02d}.jsonl"
        held = journal.read_bytes().splitlines()
        text = (extracted.run / f"rounds/002/knowledge/seed-{seed:02d}.json").read_bytes()
        assert 0 < len(held) < 3 and text.count(b"As it was: ") >= len(held)
        assert b'"steps":[' + b",".join(held) + b"," in text
        assert len(json.loads(text)["steps"]) == 3
        wanted.update(f"2:extract:{number}-done" for number in range(len(held) + 1, 4))
    assert extracted.done("extract") == wanted
    assert not extracted.done("collect")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("resumed", [IN_COLLECT, IN_EXTRACT], indirect=True)
def test_a_killed_run_goes_on_to_what_a_finished_one_holds(resumed: Resumed, unpacked: Path) -> None:
    """The same files with the same keys; what was committed before keeps its bytes, and asked the engines nothing."""
    before, after = contents(resumed.before), contents(resumed.run)
    committed = [
        name for name in before if name != "lock.json" and WORK_MARK not in name and "002/MANIFEST" not in name
    ]
    assert all(after[name] == before[name] for name in committed)
    assert layout(resumed.run) == layout(unpacked / FINISHED)
    assert keys(resumed.run) == keys(unpacked / FINISHED)
    assert read_json(resumed.run / "status.json")["state"] == "finished"
    assert "every promise holds, every game replayed" in oel("verify", resumed.run, "--replay")
    if held := [*(resumed.before / "rounds/002" / WORK[IN_COLLECT]).glob("games.jsonl")]:
        known = held[0].read_bytes().splitlines()
        files = [resumed.run / f"rounds/002/trajectories/{split}.jsonl" for split in ("extraction", "consolidation")]
        new = [json.loads(line) for file in files for line in file.read_bytes().splitlines() if line not in known]
        assert stage_row(resumed.run, "collect")["requests"] == sum(len(game["turns"]) for game in new)
    else:
        done = sum(len(rows(file)) for file in (resumed.before / "rounds/002" / WORK[IN_EXTRACT]).glob("steps-*"))
        assert stage_row(resumed.run, "extract")["requests"] == 2 * 3 - done


def stage_row(run: Path, stage: str) -> dict[str, Any]:
    """What `metrics.jsonl` says of a stage of the last round."""
    (row,) = [row for row in rows(run / "metrics.jsonl") if (row["round"], row["stage"]) == (2, stage)]
    return row
