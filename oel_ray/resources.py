"""Where a run gets its Ray from and whether it is large enough. Runs in the driver."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from oel_ray.config import RunConfig
from oel_ray.errors import UserError
from oel_ray.plan import Demand, demand

# Read by Ray when it is imported, so set before.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# A killed engine actor takes its EngineCore and Worker processes with it.
os.environ.setdefault("RAY_process_group_cleanup_enabled", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
# Ray refuses a job whose own environment names a variable that `_worker_environment` sets as well.
os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")


CLUSTER_ANSWER_S = 25.0
"""How long a cluster may take to say what it has."""

_ASK = """
import json, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(json.dumps(ray.cluster_resources()))
"""


def check_resources(config: RunConfig) -> None:
    """Compare what a run needs with the cluster that it would join, or else with this machine. Starts no Ray.

    Raises:
        UserError: too little is there, with demand, supply and shortfall; or no Ray answers at the address; or a GPU's
            optimizer is to lie on the host, and there is no GPU.
    """
    if address := _address(config):
        available = _resources_at(address)
        on_gpu = _on_gpu(config, available.get("GPU", 0))
        _check(demand(config, on_gpu=on_gpu), available, f"the cluster at {address}")
    else:
        gpus = 0 if config.engines.device == "cpu" else _gpus_here()
        on_gpu = _on_gpu(config, gpus)
        if on_gpu:
            # Ray is started with as many logical CPUs as are needed.
            needed = demand(config, on_gpu=True)
            _check(needed, {"CPU": needed.cpus, "GPU": gpus}, "this machine")
        else:
            _check_cores(config)
    if config.consolidate.offload_optimizer and not on_gpu:
        raise UserError("consolidate.offload_optimizer=true means nothing on CPUs: leave it out")


@contextmanager
def ray_cluster(config: RunConfig, run_id: str, note: Callable[[str], None]) -> Iterator[bool]:
    """Join or start a Ray cluster for the time of a run. Yields whether engines and trainer use GPUs.

    Raises:
        UserError: a cluster that was joined is too small; says by how much.
    """
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM)
    settings: dict[str, Any] = {
        "namespace": f"oel-{run_id}",
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": _worker_environment(config)},
    }
    if address := _address(config):
        ray.init(address=address, **settings)
    else:
        gpus = 0 if config.engines.device == "cpu" else _gpus_here()
        needed = demand(config, on_gpu=_on_gpu(config, gpus))
        ray.init(
            address="local",
            num_cpus=needed.cpus,
            include_dashboard=config.cluster.dashboard,
            **settings,
        )
        note(f"started Ray on this machine with {needed.cpus} logical CPUs on {os.cpu_count()} cores")
    # Ray's own handler prints a stack, and the process dies with the run folder's lock in its hands.
    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        available = ray.cluster_resources()
        on_gpu = _on_gpu(config, available.get("GPU", 0))
        _check(demand(config, on_gpu=on_gpu), available, "the Ray cluster")
        yield on_gpu
    finally:
        ray.shutdown()


def _address(config: RunConfig) -> str | None:
    """The cluster to join; None for a Ray of our own. A job joins the cluster that it was submitted to.

    Raises:
        UserError: this is a job, and it is to join another.
    """
    asked = config.cluster.address
    if asked not in (None, "auto") and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UserError(f"cluster.address={asked}, and this job runs on the cluster it was submitted to: leave it out")
    address = asked or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


def _on_gpu(config: RunConfig, gpus: float) -> bool:
    return config.engines.device == "cuda" or (config.engines.device == "auto" and gpus > 0)


def _resources_at(address: str) -> dict[str, float]:
    """What the Ray cluster at an address has.

    Asked in a process of its own: `ray.init` waits for a dead address for ten minutes and more.
    """
    if address.startswith("ray://"):
        raise UserError(
            f"'{address}' is an address for Ray Client, which cannot carry a run: start oel on a machine of the "
            "cluster and give cluster.address=HOST:PORT"
        )
    unanswered = f"no Ray answers at '{address}'"
    remedy = "start the cluster, or correct cluster.address or RAY_ADDRESS"
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"'{address}' is no address of a Ray cluster: write HOST:PORT or auto")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=4).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"{unanswered} ({error}): {remedy}") from None
    try:
        asked = subprocess.run(
            [sys.executable, "-P", "-c", _ASK, address],
            capture_output=True,
            text=True,
            timeout=CLUSTER_ANSWER_S,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{unanswered} within {CLUSTER_ANSWER_S:.0f} s: {remedy}") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        raise UserError(f"{unanswered} ({said[-1]}): {remedy}") from None
    resources: dict[str, float] = json.loads(asked.stdout.splitlines()[-1])
    return resources


def _check(needed: Demand, available: dict[str, float], where: str) -> None:
    for kind, wanted, keys in (
        ("CPU", needed.cpus, "engines.count, collect.players or consolidate.workers"),
        ("GPU", needed.gpus, "engines.count, engines.tensor_parallel or consolidate.workers"),
    ):
        there = available.get(kind, 0)
        if wanted > there:
            cpu_only = ", or set engines.device=cpu" if kind == "GPU" else ""
            raise UserError(
                f"the run needs {wanted} {kind}s and {where} has {there:.0f}: add {wanted - there:.0f}, "
                f"or lower {keys}{cpu_only}"
            )


def _check_cores(config: RunConfig) -> None:
    """A core for every thread of an engine and for every rank; each kind has the machine to itself while it works."""
    cores, engines = len(os.sched_getaffinity(0)), config.engines
    for what, wanted, keys in (
        ("the engines need", engines.count * engines.cpu_threads, "engines.count or engines.cpu_threads"),
        ("the training ranks need", config.consolidate.workers, "consolidate.workers"),
    ):
        if wanted > cores:
            raise UserError(
                f"{what} {wanted} cores and this machine has {cores}, {wanted - cores} too few: lower {keys}, "
                "or join a larger cluster with cluster.address"
            )


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def _worker_environment(config: RunConfig) -> dict[str, str]:
    environment = {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # the driver has fetched what there is to fetch
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # a rank imports torch before it is up
    }
    if config.engines.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    return environment
