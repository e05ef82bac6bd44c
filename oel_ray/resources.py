"""Where a run gets its Ray from and whether it is large enough. Runs in the driver."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from oel_ray.config import RunConfig
from oel_ray.errors import UserError

# Read by Ray when it is imported, so set before.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# A killed engine actor takes its EngineCore and Worker processes with it.
os.environ.setdefault("RAY_process_group_cleanup_enabled", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")


@dataclass(frozen=True)
class Demand:
    """What a run asks of Ray: logical CPUs and GPUs, all stages' actors at once."""

    cpus: int
    gpus: int


def demand(config: RunConfig, *, on_gpu: bool) -> Demand:
    """Engines and players live as long as the run; extraction workers and training ranks take turns."""
    engines = config.engines
    taking_turns = max(config.extract.workers, config.consolidate.workers)
    if on_gpu:
        return Demand(
            cpus=engines.count + config.collect.players + taking_turns,
            gpus=engines.count * engines.tensor_parallel + config.consolidate.workers,
        )
    return Demand(cpus=engines.count * engines.cpu_threads + config.collect.players + taking_turns, gpus=0)


@contextmanager
def ray_cluster(config: RunConfig, run_id: str, note: Callable[[str], None]) -> Iterator[bool]:
    """Join or start a Ray cluster for the time of a run. Yields whether engines and trainer use GPUs.

    Raises:
        UserError: a cluster that was joined is too small; says by how much.
    """
    import ray

    settings: dict[str, Any] = {
        "namespace": f"oel-{run_id}",
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": _worker_environment(config)},
    }
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, **settings)
    else:
        on_gpu = config.engines.device == "cuda" or (config.engines.device == "auto" and _gpus_here() > 0)
        needed = demand(config, on_gpu=on_gpu)
        ray.init(
            address="local",
            num_cpus=needed.cpus,
            include_dashboard=config.cluster.dashboard,
            **settings,
        )
        note(f"started Ray on this machine with {needed.cpus} logical CPUs on {os.cpu_count()} cores")
    try:
        available = ray.cluster_resources()
        on_gpu = config.engines.device == "cuda" or (config.engines.device == "auto" and available.get("GPU", 0) > 0)
        _check(demand(config, on_gpu=on_gpu), available)
        yield on_gpu
    finally:
        ray.shutdown()


def _check(needed: Demand, available: dict[str, float]) -> None:
    for kind, wanted in (("CPU", needed.cpus), ("GPU", needed.gpus)):
        there = available.get(kind, 0.0)
        if wanted > there:
            raise UserError(
                f"the run needs {wanted} {kind}s and the Ray cluster has {there:.0f}: add {wanted - there:.0f}, "
                "or lower engines.count, collect.players or consolidate.workers"
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
