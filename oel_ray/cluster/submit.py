"""Submit a run as a job of a Ray cluster (`oel submit`). Runs in the process of the command line, on any machine.

It only talks to the cluster's job server and starts no Ray. It uses Ray's own authentication: `RAY_AUTH_MODE=token`,
with the token where Ray looks for it.
"""

import asyncio
import logging
import os
import re
import shlex
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oel_ray.errors import RunFailed, UserError, one_line
from oel_ray.records import Record

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PASSED_ON = ("NCCL_", "GLOO_", "HF_", "VLLM_", "OEL_")
"""Prefixes of the environment variables that are passed on to a job."""
SECRET = re.compile(r"^[^=]*(TOKEN|SECRET|KEY|PASS|CREDENTIAL|AUTH|COOKIE)|=.*://[^/\s]*@", re.IGNORECASE)
"""Pattern of a secret in `NAME=value`. Secrets are not passed on, because the dashboard shows a job's environment."""
EXCLUDED = ("oel_ray/", "runs/", "*.safetensors", "*.bin", "*.gguf", "*.pt", ".mypy_cache/", ".pytest_cache/")
"""Files that are not packed, besides those in `.gitignore` and `.rayignore`: large ones, and this package, because a
copy would hide the installed one. `cluster/runtime_env.yaml` has the same list."""
LARGEST_PACKAGE = 64 * 2**20
"""Bytes of a working directory before compression; Ray's own limit, for the compressed one, is eight times that."""


class Job(Record):
    """The request to the job server; `metadata` holds the run's name."""

    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]


def plan_job(name: str, config: str, overrides: Iterable[str], runs: Path, environ: Mapping[str, str]) -> Job:
    """Plan the job of a run, the same for every attempt. Later attempts resume in the run's folder below `runs`.

    `config` is a preset, or a YAML file, whose folder is packed and is the job's working directory.

    Raises:
        UserError: the name or a folder cannot be used.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise UserError(f"'{name}' is no name for a run: use 1 to 64 letters, digits, - and _")
    if not runs.is_absolute():
        raise UserError(f"--runs {runs} is relative: give a folder of storage that all nodes share, e.g. /mnt/oel/runs")
    # A run that is stopped lets its games in play end; Ray would kill it after 3 s.
    runtime_env: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"} | passed_on(environ)}
    if (file := Path(config).resolve()).is_file():
        check_size(file.parent, packed(file.parent))
        config = file.name
        runtime_env |= {"working_dir": str(file.parent), "excludes": list(EXCLUDED)}
    run_dir = str(runs / name)
    command = shlex.join(["oel", "run", config, *overrides, "--run-dir", run_dir, "--resume"])
    metadata = {"run": name, "config": config, "run_dir": run_dir}
    return Job(entrypoint=command, runtime_env=runtime_env, metadata=metadata)


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that go with a job."""
    return {k: v for k, v in environ.items() if k.startswith(PASSED_ON) and not SECRET.search(f"{k}={v}")}


def next_attempt(name: str, jobs: Mapping[str, bool]) -> int:
    """The number of the next job of a run. `jobs`: whether each job that the cluster knows, by its id, is at an end.

    Raises:
        UserError: one of them is not: two would want the same run folder.
    """
    attempts = {job: int(found[1]) for job in jobs if (found := re.fullmatch(rf"oel-{re.escape(name)}-(\d+)", job))}
    if busy := [job for job in attempts if not jobs[job]]:
        raise UserError(f"the run {name} is under way as job {busy[0]}: follow it with 'ray job logs -f {busy[0]}'")
    return max(attempts.values(), default=0) + 1


def packed(folder: Path) -> dict[str, int]:
    """Bytes of every file that Ray would pack, by its path in the folder."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    logging.getLogger("ray").setLevel(logging.WARNING)  # else a line for every ignore file
    paths: list[Path] = []  # by Ray's own walk: ignore files may lie in every folder
    excludes = _get_excludes(folder, [*get_runtime_env_default_excludes(), *EXCLUDED])
    _dir_travel(folder, [excludes], paths.append, include_gitignore=True)
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths if path.is_file()}


def check_size(folder: Path, sizes: Mapping[str, int]) -> None:
    """Refuse a working directory that would take long to pack, or not arrive.

    Raises:
        UserError: it is too large; names the ten largest files.
    """
    if (total := sum(sizes.values())) > LARGEST_PACKAGE:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:10]
        named = ", ".join(f"{name} ({sizes[name] / 2**20:.1f} MiB)" for name in largest)
        raise UserError(
            f"the job's working directory {folder} has {total / 2**20:.0f} MiB, more than {LARGEST_PACKAGE // 2**20}: "
            f"name what it can do without in a .rayignore there, or put CONFIG elsewhere; the largest: {named}"
        )


def submit(job: Job, address: str) -> tuple["JobSubmissionClient", str]:
    """Hand a job to the job server at an address such as http://127.0.0.1:8265; returns its client and the job's id.

    Raises:
        UserError: no job server answers there, or not to us; or a job of the same run is under way.
    """
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # RAY_ADDRESS would count for more than an argument
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        if not address.startswith(("http://", "https://")):  # Ray would ask another of its servers for this one
            raise UserError(f"'{address}' is no address of a job server: write that of the dashboard, http://HOST:PORT")
        client = JobSubmissionClient(address)
        known = {str(found.submission_id): found.status.is_terminal() for found in client.list_jobs()}
        name = job.metadata["run"]
        job_id = f"oel-{name}-{next_attempt(name, known)}"
        return client, client.submit_job(submission_id=job_id, **job.model_dump())
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise UserError(
            f"the Ray job server at {address} takes no job from here ({one_line(error)}): open a tunnel to the "
            "dashboard, correct --address, or export RAY_AUTH_MODE=token with the cluster's token in ~/.ray/auth_token"
        ) from None


def follow(client: "JobSubmissionClient", job_id: str) -> int:
    """Print the output of a job until it ends. Returns its exit code as in a shell; 130 if it was stopped.

    Raises:
        RunFailed: the job could not begin, or its server no longer answers.
    """
    from aiohttp import ClientError

    async def show() -> None:
        async for text in client.tail_job_logs(job_id):
            print(text, end="", flush=True)

    try:
        asyncio.run(show())
        while not (job := client.get_job_info(job_id)).status.is_terminal():
            time.sleep(1)
    except (OSError, RuntimeError, ClientError) as error:
        raise RunFailed(f"lost sight of the job {job_id}, which may go on ({one_line(error)})") from None
    if job.driver_exit_code is None and job.status != "STOPPED":
        raise RunFailed(f"the job {job_id} could not begin: {' '.join(str(job.message).split())}")
    code = 130 if job.driver_exit_code is None else int(job.driver_exit_code)
    return code if code >= 0 else 128 - code
