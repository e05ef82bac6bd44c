"""The run folder: who may use it, and what a crash leaves behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oel_ray.errors import RunFailed, UserError
from oel_ray.runs import files as durable
from oel_ray.runs import folder as runs
from oel_ray.runs import lock
from oel_ray.runs.files import read_json, write_atomically
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.lock import LOCK_FILE, TAKEOVER_FILE, Holder
from oel_ray.runs.stage import Stage
from oel_ray.views.show import remarks
from oel_ray.views.verify import verify
from tests.support import example_run
from tests.support.example_run import small_config

DRIVER = """
import sys
from pathlib import Path
from tests.support.example_run import run_stages, small_config
from oel_ray.errors import UserError
from oel_ray.runs.folder import RunFolder
path, resume, wait = Path(sys.argv[1]), sys.argv[2] == "resume", sys.argv[3] == "wait"
try:
    folder = RunFolder.resume(path, None) if resume else RunFolder.create(path, small_config())
except UserError as error:
    print(f"refused: {error}")
    sys.exit(2)
with folder:
    print("holds", flush=True)
    if wait:
        sys.stdin.readline()
    print(*run_stages(folder))
"""


def driver(path: Path, mode: str, wait: str = "", **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(path), mode, wait],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def leave_lock(folder: Path, host: str, pid: int, age_s: float) -> None:
    path = folder / LOCK_FILE
    path.write_bytes(Holder(token="other", host=host, pid=pid, command="oel run x", started="yesterday").to_json())
    os.utime(path, (time.time() - age_s,) * 2)


def test_a_new_run_records_its_configuration_versions_and_status(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "a" / "run", small_config()) as folder:
        assert folder.config == small_config()
        assert read_json(folder.path / "status.json")["state"] == "running"
        assert {"version", "run_id", "created", "packages", "auto"} == set(folder.info)
        assert len(folder.run_id) == 8
        folder.log_metrics({"kl": 0.5})
        folder.log_metrics({"kl": 0.25})
        assert (folder.path / "metrics.jsonl").read_text() == '{"kl":0.5}\n{"kl":0.25}\n'
    assert read_json(folder.path / "status.json")["state"] == "partial"
    assert not (folder.path / LOCK_FILE).exists()


@pytest.mark.parametrize(
    ("error", "state"), [(RunFailed("x"), "failed"), (KeyboardInterrupt(), "interrupted"), (ValueError(), "failed")]
)
def test_the_status_tells_how_a_run_ended(tmp_path: Path, error: BaseException, state: str) -> None:
    with pytest.raises(type(error)), RunFolder.create(tmp_path, small_config()) as folder:
        folder.set_status("running", round=1, stage="collect")
        raise error
    status = read_json(folder.path / "status.json")
    assert (status["state"], status["round"], status["stage"]) == (state, 1, "collect")


def test_a_folder_with_a_run_is_refused(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, small_config()):
        pass
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        RunFolder.create(tmp_path, small_config())
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml"])
def test_a_folder_of_somebody_else_is_refused_untouched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        RunFolder.create(tmp_path, small_config())
    with pytest.raises(UserError, match="holds no run"):
        RunFolder.resume(tmp_path, None)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_file_or_an_absent_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, message in (("file", "is a file"), ("file/below", "cannot write to|is a file|Not a directory")):
        with pytest.raises(UserError, match=message):
            RunFolder.create(tmp_path / path, small_config())
    for path in ("file", "absent"):
        with pytest.raises(UserError, match="give the folder of a run"):
            RunFolder.resume(tmp_path / path, None)


def test_resume_wants_the_same_configuration(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, small_config()):
        pass
    with pytest.raises(UserError) as error:
        RunFolder.resume(tmp_path, small_config(rounds=5, env={"id": "FrozenLake-v0", "max_turns": 3}))
    assert "rounds: 2 -> 5, env.params.size: 3 -> None" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / LOCK_FILE).exists()
    for config in (small_config(), None):
        with RunFolder.resume(tmp_path, config) as folder:
            assert folder.config == small_config()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_resume_wants_the_model_that_the_run_began_with(tmp_path: Path, name: str) -> None:
    model, path = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / file).write_text("{}")
    with RunFolder.create(path, small_config()) as folder:
        example_run.prepare(Stage(folder, 0, "prepare"), model)
    (model / "notes.md").write_text("read by nobody")
    with RunFolder.resume(path, None):
        (model / name).write_text("{ }")
    with pytest.raises(UserError, match=rf"^the configuration differs .*: {model}/{name}: .* -> .*; leave CONF"):
        RunFolder.resume(path, None)
    with pytest.raises(UserError, match="put the model's files back"):
        RunFolder.open_to_resume(path, small_config())
    example_run.build(tmp_path / "later")
    reference = tmp_path / "later/rounds/000/policy/policy.json"
    reference.write_bytes((path / "rounds/000/policy/policy.json").read_bytes())
    with RunFolder.resume(tmp_path / "later", None):
        pass  # every round has a policy of its own


def test_stages_are_done_once(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, small_config()) as folder:
        done = example_run.run_stages(folder)
        assert len(done) == 12
        assert example_run.run_stages(folder) == []
        entry = Stage(folder, 1, "consolidate").entry
        assert entry is not None
        assert list(entry.files) == [
            "consolidation/metrics.jsonl",
            "consolidation/samples.jsonl",
            "policy/config.json",
            "policy/model.safetensors",
        ]
        assert folder.policy(0) == Path("base-model")
        assert folder.policy(1) == folder.path / "rounds/001/policy"
        assert not list(tmp_path.glob("rounds/*/.work-*"))
        assert folder.rounds() == [0, 1, 2]


def test_a_stage_resumes_with_the_work_of_an_earlier_attempt_only_if_its_key_is_the_same(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, small_config()) as folder:
        stage = Stage(folder, 1, "collect")
        stage.begin("a").trajectories("extraction").write_text("half")
        assert stage.begin("a").trajectories("extraction").read_text() == "half"
        assert not stage.begin("b").trajectories("extraction").exists()
        kept = folder.quarantine / "rounds/001/.work-collect/trajectories/extraction.jsonl"
        assert kept.read_text() == "half", "it is neither read nor lost"


def test_a_stage_without_a_key_starts_with_an_empty_folder(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, small_config()) as folder:
        stage = Stage(folder, 1, "collect")
        stage.begin().trajectories("extraction").write_text("half")
        assert not stage.begin().trajectories("extraction").exists()
        with pytest.raises(FileNotFoundError):
            stage.commit(["trajectories/extraction.jsonl"], {})
        assert not stage.is_done


def test_on_resume_files_that_no_manifest_names_are_moved_to_quarantine(tmp_path: Path) -> None:
    example_run.build(tmp_path)
    later = tmp_path / "rounds/003/trajectories/extraction.jsonl"
    later.parent.mkdir(parents=True)
    later.write_text("of a future that was taken back")
    (tmp_path / "rounds/002/MANIFEST.json").unlink()
    work = tmp_path / "rounds/002/.work-collect/games.jsonl"
    work.parent.mkdir()
    work.write_text("in work")
    with RunFolder.resume(tmp_path, None) as folder:
        assert not later.exists()
        assert (folder.quarantine / "rounds/003/trajectories/extraction.jsonl").read_text().startswith("of a future")
        assert (folder.quarantine / "rounds/002/policy/model.safetensors").exists()
        assert [path for path in (tmp_path / "rounds/002").rglob("*") if path.is_file()] == [work]
        assert verify(tmp_path) == []
        assert example_run.run_stages(folder)[0] == "2:collect"
    assert verify(tmp_path) == []


@pytest.mark.process
@pytest.mark.parametrize("place", ["1:collect", "1:consolidate:moved", "2:evaluate:moved"])
def test_a_killed_run_goes_on_without_doing_a_stage_twice(tmp_path: Path, place: str) -> None:
    path = tmp_path / "run"
    killed = driver(path, "create", OEL_RAY_KILL_AFTER=place)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    round_number, name, *moved = place.split(":")
    assert Stage(RunFolder.open(path), int(round_number), name).is_done == (not moved)

    resumed = driver(path, "resume")
    redone = resumed.communicate(timeout=60)[0].splitlines()[1].split()
    assert resumed.returncode == 0
    assert (f"{round_number}:{name}" in redone) == bool(moved)
    assert verify(path) == []
    there = {"config.yaml", "run.json", "status.json", "rounds"} | ({"quarantine"} if moved else set())
    assert there == {entry.name for entry in path.iterdir()}


@pytest.mark.process
@pytest.mark.parametrize("left", ["nothing", "stale lock"])
def test_of_two_processes_that_start_at_once_only_one_gets_the_folder(tmp_path: Path, left: str) -> None:
    mode = "create"
    if left == "stale lock":
        with RunFolder.create(tmp_path, small_config()):
            pass
        leave_lock(tmp_path, socket.gethostname(), dead_pid(), 0)
        mode = "resume"
    drivers = [driver(tmp_path, mode, "wait") for _ in range(2)]
    assert all(process.stdout for process in drivers)
    first = [process.stdout.readline() for process in drivers if process.stdout]
    assert sorted(line.split()[0] for line in first) == ["holds", "refused:"], first
    refused = next(line for line in first if line.startswith("refused"))
    holder = drivers[first.index("holds\n")]
    assert "in use by" in refused
    assert f"process {holder.pid} on {socket.gethostname()} since" in refused or "just starting" in refused
    for process in drivers:
        process.communicate("\n", timeout=60)
    assert holder.returncode == 0
    assert verify(tmp_path) == []


def test_a_refused_process_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, small_config()):
        message = f"in use by process {os.getpid()} on {socket.gethostname()} since 2"
        with pytest.raises(UserError, match=message):
            RunFolder.create(tmp_path, small_config())
        with pytest.raises(UserError, match=message):
            RunFolder.resume(tmp_path, None)
    assert not (tmp_path / TAKEOVER_FILE).exists()


@pytest.mark.process
@pytest.mark.parametrize(
    ("host", "dead", "age_s", "stale"),
    [
        ("here", True, 0, True),
        ("here", False, 0, False),
        ("here", False, 61, True),
        ("elsewhere", True, 30, False),
        ("elsewhere", True, 61, True),
    ],
)
def test_only_a_stale_lock_is_taken_over(tmp_path: Path, host: str, dead: bool, age_s: float, stale: bool) -> None:
    with RunFolder.create(tmp_path, small_config()):
        pass
    pid = dead_pid() if dead else os.getppid()
    leave_lock(tmp_path, socket.gethostname() if host == "here" else host, pid, age_s)
    if stale:
        with RunFolder.resume(tmp_path, None):
            assert Holder.from_json((tmp_path / LOCK_FILE).read_bytes()).pid == os.getpid()
        assert not (tmp_path / LOCK_FILE).exists()
    else:
        with pytest.raises(UserError, match=f"in use by process {pid}"):
            RunFolder.resume(tmp_path, None)
        assert Holder.from_json((tmp_path / LOCK_FILE).read_bytes()).token == "other"
    assert not (tmp_path / TAKEOVER_FILE).exists()


@pytest.mark.process
def test_a_takeover_that_died_does_not_block_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "TAKEOVER_WAIT_S", 0.1)
    with RunFolder.create(tmp_path, small_config()):
        pass
    leave_lock(tmp_path, socket.gethostname(), dead_pid(), 100)
    (tmp_path / TAKEOVER_FILE).write_text("")
    os.utime(tmp_path / TAKEOVER_FILE, (time.time() - 100,) * 2)
    with pytest.raises(UserError, match="try again"):
        RunFolder.resume(tmp_path, None)
    with RunFolder.resume(tmp_path, None):
        pass


def test_the_heartbeat_keeps_the_lock_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    with RunFolder.create(tmp_path, small_config()):
        os.utime(tmp_path / LOCK_FILE, (0, 0))
        time.sleep(0.5)
        assert time.time() - (tmp_path / LOCK_FILE).stat().st_mtime < 10


def test_a_process_that_lost_the_lock_commits_nothing(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, small_config()) as folder:
        leave_lock(tmp_path, "elsewhere", 7, 0)
        with pytest.raises(RunFailed, match=r"the lock of the run folder was lost: .* process 7 on elsewhere"):
            example_run.collect(Stage(folder, 1, "collect"))
        assert not Stage(folder, 1, "collect").is_done
    assert (tmp_path / LOCK_FILE).exists()


@pytest.mark.process
def test_a_run_that_died_while_it_was_made_can_be_made_again(tmp_path: Path) -> None:
    leave_lock(tmp_path, socket.gethostname(), dead_pid(), 0)
    (tmp_path / "config.yaml").write_text("rounds:")
    with RunFolder.create(tmp_path, small_config()) as folder:
        assert folder.config == small_config()


def test_a_folder_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, small_config()):
        pass
    example_run.edit_json(tmp_path / "run.json", lambda info: info.update(version=99))
    with pytest.raises(UserError, match="newer oel-ray"):
        RunFolder.open(tmp_path)


def test_an_allowed_change_takes_effect_at_the_first_stage_that_is_left(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, small_config()) as folder:
        for number, name in ((0, "prepare"), (0, "evaluate"), (1, "collect"), (1, "extract")):
            example_run.STAGES[name](Stage(folder, number, name))
    fewer = {
        "consolidate": {"steps": 3, "games_per_step": 1, "precision": "float32", "learning_rate": 0.5},
        "evaluate": {"maps": 4, "seeds": 2},
    }
    new = small_config(rounds=1, extract={"seeds": 7}, **fewer)
    opened = RunFolder.open_to_resume(tmp_path, new, allow_change=True)
    assert (opened.config, RunFolder.open(tmp_path).config) == (new, small_config()), "opening writes nothing"
    with RunFolder.resume(tmp_path, new, allow_change=True) as folder:
        assert RunFolder.open(tmp_path).config == folder.config == new
        assert folder.manifest(1).stages["extract"].config == 0
        entry = folder.manifest(1).stages["extract"]
        assert folder.config_of(entry).extract.seeds == 2
        (change,) = folder.info["changes"]
        assert change["from"] == "evaluate_in_context of round 1"
        assert change["changes"][:2] == ["rounds: 2 -> 1", "extract.seeds: 2 -> 7"]
    with RunFolder.resume(tmp_path, None) as folder:
        example_run.consolidate(Stage(folder, 1, "consolidate"))
        assert folder.manifest(1).stages["consolidate"].config == 1
    assert verify(tmp_path) == [], "two knowledge texts were planned when they were written"
    assert remarks(tmp_path)[0].startswith("changed from evaluate_in_context of round 1 on: rounds: 2 -> 1, extract")
    with RunFolder.resume(tmp_path, small_config(), allow_change=True) as folder:
        assert [folder.config_of(entry).rounds for entry in folder.manifest(1).stages.values()] == [2, 2, 1]
        assert len(folder.info["changes"]) == 2
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"thinking": True}, "thinking: False -> True"),
        ({"model": "other"}, "model: 'smollm2-135m' -> 'other'"),
        ({"env": {"id": "FrozenLake-v0", "max_turns": 3, "params": {"size": 4}}}, "env.params.size: 3 -> 4"),
        ({"evaluate": {"maps": 5, "seeds": 2, "accumulation_steps": [1]}}, "held-out maps: 4 -> 5"),
    ],
)
def test_a_setting_that_committed_stages_depend_on_cannot_be_changed(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    with RunFolder.create(tmp_path, small_config()) as folder:
        pass
    RunFolder.open_to_resume(tmp_path, small_config(**change), allow_change=True)
    with RunFolder.resume(tmp_path, None) as folder:
        example_run.prepare(Stage(folder, 0, "prepare"), Path("base-model"))
    with pytest.raises(UserError) as error:
        RunFolder.resume(tmp_path, small_config(**change), allow_change=True)
    assert f"depend on {named}: start a new run" in str(error.value).replace(f", {named}", "", 1)
    assert RunFolder.open(tmp_path).config == small_config()


@pytest.mark.parametrize("died_behind", ["config-0.yaml", "run.json"])
def test_a_configuration_change_that_was_cut_off_has_no_effect(
    tmp_path: Path, died_behind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder.create(tmp_path, small_config()) as folder:
        example_run.prepare(Stage(folder, 0, "prepare"), Path("base-model"))

    def dies(path: Path, content: bytes) -> None:
        write_atomically(path, content)
        if path.name == died_behind:
            raise KeyboardInterrupt

    new = small_config(rounds=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(durable, "write_atomically", dies)
        patch.setattr(runs, "write_atomically", dies)
        RunFolder.resume(tmp_path, new, allow_change=True)
    (tmp_path / LOCK_FILE).unlink()
    assert verify(tmp_path) == []
    with pytest.raises(UserError, match="rounds: 2 -> 3"):
        RunFolder.resume(tmp_path, new)
    with RunFolder.resume(tmp_path, new, allow_change=True) as folder:
        example_run.STAGES["evaluate"](Stage(folder, 0, "evaluate"))
        rounds = [folder.config_of(entry).rounds for entry in folder.manifest(0).stages.values()]
    assert (rounds, RunFolder.open(tmp_path).config) == ([2, 3], new)


def test_a_changed_model_is_accepted_only_if_changes_are_allowed_and_prepare_runs_again(tmp_path: Path) -> None:
    model, path = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    with RunFolder.create(path, small_config()) as folder:
        example_run.prepare(Stage(folder, 0, "prepare"), model)
        example_run.STAGES["evaluate"](Stage(folder, 0, "evaluate"))
    (model / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match="oel run --resume --allow-config-change"):
        RunFolder.resume(path, None)
    with RunFolder.resume(path, None, allow_change=True) as folder:
        assert folder.committed[0] == {"evaluate"}
        assert (folder.quarantine / "rounds/000/policy/policy.json").exists()
        assert folder.info["changes"][0]["changes"][0].startswith(f"{model}/tokenizer.json: ")
        example_run.prepare(Stage(folder, 0, "prepare"), model)
    with RunFolder.resume(path, None):
        pass
    assert verify(path) == []


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("001/evaluation.json", b"{", r"evaluation.json (is damaged|has 1 bytes)"),
        ("001/trajectories/extraction.jsonl", None, r"extraction.jsonl is missing"),
        ("001/MANIFEST.json", b"[]", r"MANIFEST.json is no manifest"),
    ],
)
def test_a_run_is_resumed_only_if_the_files_it_goes_on_from_are_unchanged(
    tmp_path: Path, file: str, content: bytes | None, told: str
) -> None:
    run = example_run.build(tmp_path / "run")
    RunFolder(run).withdraw(2, [])
    path = run / "rounds" / file
    before = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=told):
        RunFolder.resume(run, None)
    assert not (run / LOCK_FILE).exists()
    path.write_bytes(before)
    with RunFolder.resume(run, None):
        pass


def test_rounds_can_be_taken_back_even_if_their_files_are_damaged(tmp_path: Path) -> None:
    run = example_run.build(tmp_path / "run")
    (run / "rounds/002/evaluation.json").write_bytes(b"{")
    with pytest.raises(UserError, match=r"put back what was there.*"):
        RunFolder.resume(run, None)
    with RunFolder.locked(run) as folder:
        folder.set_aside([folder.files(2).root])
    with RunFolder.resume(run, None) as folder:
        assert folder.rounds() == [0, 1]
