"""A run as a Ray job: what is asked of the job server. No Ray runs here; tests/e2e/test_job.py asks a real one."""

import os
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from oel_ray.cluster import session, submit
from oel_ray.config.load import parse_config
from oel_ray.errors import RunFailed, UserError
from tests.support.job_server import job_server

ROOT = Path(__file__).parents[2]
RUNS = Path("/mnt/oel/runs")


def test_a_preset_needs_nothing_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = submit.plan_job("first", "quickstart", ["rounds=1", "env.params={size: 3}"], RUNS, {})
    assert shlex.split(job.entrypoint) == [
        "oel", "run", "quickstart", "rounds=1", "env.params={size: 3}", "--run-dir", "/mnt/oel/runs/first", "--resume",
    ]  # fmt: skip
    assert job.metadata == {"run": "first", "config": "quickstart", "run_dir": "/mnt/oel/runs/first"}
    assert job.runtime_env == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}


def test_the_folder_of_a_file_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "game.yaml").write_text("base: quickstart\n")
    monkeypatch.chdir(tmp_path)
    job = submit.plan_job("first", "mine/game.yaml", [], RUNS, {})
    assert job.entrypoint == "oel run game.yaml --run-dir /mnt/oel/runs/first --resume"
    assert job.runtime_env["working_dir"] == str(tmp_path / "mine")
    assert job.runtime_env["excludes"] == list(submit.EXCLUDED)


@pytest.mark.parametrize(
    ("name", "value", "passed"),
    [
        ("NCCL_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("HF_HOME", "/mnt/oel/models", True),
        ("VLLM_LOGGING_LEVEL", "INFO", True),
        ("OEL_RAY_CACHE", "/mnt/oel/models", True),
        ("HF_ENDPOINT", "https://hub.example.org/a@b", True),
        ("HF_HOME", "/mnt/KEYS=1", True),
        ("PATH", "/usr/bin", False),
        ("RAY_ADDRESS", "http://127.0.0.1:8265", False),
        ("MY_NCCL_DEBUG", "1", False),
        ("HF_TOKEN", "canary", False),
        ("HUGGING_FACE_HUB_TOKEN", "canary", False),
        ("VLLM_API_KEY", "canary", False),
        ("OEL_STORE_PASSWORD", "canary", False),
        ("HF_ENDPOINT", "https://me:canary@hub.example.org", False),
    ],
)
def test_variables_of_libraries_go_with_a_job_but_secrets_and_those_of_this_machine_do_not(
    name: str, value: str, passed: bool
) -> None:
    assert submit.passed_on({name: value}) == ({name: value} if passed else {})
    job = submit.plan_job("first", "quickstart", [], RUNS, {name: value})
    assert "canary" not in job.model_dump_json()


def test_jobs_of_one_name_are_numbered_attempts_and_only_one_may_be_under_way() -> None:
    others = {"raysubmit_1": False, "oel-first-run-4": False, "oel-second-9": False, "None": False}
    assert submit.next_attempt("first", others) == 1
    assert submit.next_attempt("first", others | {"oel-first-1": True, "oel-first-10": True, "oel-first-9": True}) == 11
    with pytest.raises(UserError, match="under way as job oel-first-2: follow it with 'ray job logs -f oel-first-2'"):
        submit.next_attempt("first", others | {"oel-first-1": True, "oel-first-2": False})


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../up", "é", 65 * "x", "a\n"])
def test_a_name_that_cannot_name_a_run_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is no name for a run"):
        submit.plan_job(name, "quickstart", [], RUNS, {})


def test_only_what_ray_would_pack_is_counted(tmp_path: Path) -> None:
    kept = {"game.yaml", "sub/kept.py"}
    left = {"notes.txt", ".git/pack", "runs/first/model.json", "model.safetensors", "oel_ray/cli/app.py"}
    for file in kept | left:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(file)
    (tmp_path / ".gitignore").write_text("notes.txt\n")
    assert set(submit.packed(tmp_path)) == kept | {".gitignore"}


def test_this_repository_packs_to_less_than_5_mib() -> None:
    assert sum(submit.packed(ROOT).values()) < 5 * 2**20


def test_a_large_folder_is_refused_with_the_ten_largest_files(tmp_path: Path) -> None:
    (tmp_path / "game.yaml").write_text("rounds: 1\n")
    for number in range(12):
        with (tmp_path / f"data-{number:02}.csv").open("wb") as file:
            file.truncate((number + 1) * 2**20)
    submit.check_size(tmp_path, {"just": submit.LARGEST_PACKAGE})
    with pytest.raises(UserError, match=r"has 78 MiB, more than 64: .*\.rayignore") as refused:
        submit.plan_job("first", str(tmp_path / "game.yaml"), [], RUNS, {})
    named = str(refused.value).partition("the largest: ")[2].split(", ")
    assert [named[0], named[-1], len(named)] == ["data-11.csv (12.0 MiB)", "data-02.csv (3.0 MiB)", 10]


def test_a_job_joins_the_cluster_that_it_was_submitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    asked: list[str] = []
    monkeypatch.setattr(session, "nodes_at", lambda address: asked.append(address) or {"a": {"CPU": 64.0}})
    session.check_resources(parse_config({}))
    assert asked == ["10.0.0.1:6379"]
    for elsewhere in ("local", "10.0.0.2:6379"):
        with pytest.raises(UserError, match=f"cluster.address={elsewhere}, and this job runs on .*: leave it out"):
            session.check_resources(parse_config({"cluster": {"address": elsewhere}}))


class EndedJob:
    """A job server with one job, which prints two lines and is at an end."""

    def __init__(self, status: str, exit_code: int | None, message: str = "", breaks_off: bool = False) -> None:
        self.info = SimpleNamespace(status=JobStatus(status), driver_exit_code=exit_code, message=message)
        self.breaks_off = breaks_off

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield f"{job_id}: one\n"
        if self.breaks_off:
            raise RuntimeError("WebSocket connection closed")
        yield "two\n"

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        return self.info


@pytest.mark.parametrize(
    ("status", "exit_code", "told"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", -9, 137), ("FAILED", 137, 137), ("STOPPED", None, 130)],
)
def test_the_exit_code_is_that_of_the_job(
    status: str, exit_code: int | None, told: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.follow(EndedJob(status, exit_code), "oel-first-1") == told
    assert capsys.readouterr().out == "oel-first-1: one\ntwo\n"


def test_a_job_that_cannot_begin_or_be_followed_fails_with_the_reason() -> None:
    with pytest.raises(RunFailed, match="could not begin: no such package here"):
        submit.follow(EndedJob("FAILED", None, "no such\npackage here"), "oel-first-1")
    with pytest.raises(
        RunFailed, match=r"lost sight of the job oel-first-1, which may go on \(RuntimeError: WebSocket"
    ):
        submit.follow(EndedJob("RUNNING", None, breaks_off=True), "oel-first-1")


def oel_submit(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "oel_ray", "submit", *arguments],
        env={key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.process
def test_a_job_is_submitted_and_followed(tmp_path: Path) -> None:
    """The command line, and Ray's own client, with all but the cluster; RAY_ADDRESS does not count for more."""
    (tmp_path / "game.yaml").write_text("base: quickstart\n")
    with job_server("c0ffee") as server:
        command = [str(tmp_path / "game.yaml"), "rounds=1", "--name", "first", "--address", server.address]
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "c0ffee", "RAY_ADDRESS": "http://127.0.0.1:1"}
        done = oel_submit(*command, **token, HF_TOKEN="hf_canary", NCCL_DEBUG="WARN")
        assert done.returncode == 0, done.stderr
        assert done.stdout == "oel run game.yaml rounds=1 --run-dir /mnt/oel/runs/first --resume\n"
        server.exit_code = 2
        failed = oel_submit(*command, **token)
        assert failed.returncode == 2
        assert failed.stderr.endswith("oel: the job oel-first-2 ended with exit code 2\n")

        server.jobs["oel-first-2"]["status"] = "RUNNING"
        refused = oel_submit(*command, **token)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "the run first is under way as job oel-first-2" in refused.stderr
        left = oel_submit("quickstart", "--name", "second", "--address", server.address, "--no-follow", **token)
        assert (left.returncode, left.stdout) == (0, "")
        assert f"stop it with 'ray job stop oel-second-1 --address {server.address}'" in left.stderr

        stranger = oel_submit(*command, RAY_AUTH_MODE="disabled")
        assert stranger.returncode == 2
        assert stranger.stderr.startswith(f"oel: error: the Ray job server at {server.address} takes no job from here")
        assert "export RAY_AUTH_MODE=token" in stranger.stderr
    assert list(server.jobs) == ["oel-first-1", "oel-first-2", "oel-second-1"]
    job = server.jobs["oel-first-1"]
    assert job["metadata"] == {"run": "first", "config": "game.yaml", "run_dir": "/mnt/oel/runs/first"}
    assert job["runtime_env"]["env_vars"].items() >= {"RAY_JOB_STOP_WAIT_TIME_S": "60", "NCCL_DEBUG": "WARN"}.items()
    (package,) = server.packages
    assert job["runtime_env"]["working_dir"] == f"gcs://{package}"
    assert "canary" not in str(server.jobs)
