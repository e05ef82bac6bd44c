"""Join or start Ray for a run, and check that it is large enough. Runs in the driver."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from oel_ray.cluster.demand import GPU_MEMORY, Nodes, amounts, demands, place, placement, ray_options, total
from oel_ray.cluster.stacks import HANG_FOLDER
from oel_ray.config.precision import Auto, auto_here, auto_on_nodes, bfloat16_units
from oel_ray.config.schema import RunConfig
from oel_ray.errors import UserError

CLUSTER_ANSWER_S = 25.0
"""Seconds that a cluster may take to report its resources."""

_NODES_ANSWER_S = 10.0
_BFLOAT16 = "bfloat16"
"""The key, among a node's resources, of whether its processor has bfloat16 instructions."""

_ASK = """
import json, sys
from oel_ray.cluster.session import alive_nodes
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(json.dumps(alive_nodes(processors=True)))
"""


def check_resources(config: RunConfig) -> Auto:
    """Compare the demand of a run with the cluster that it would join, or else with this machine. Starts no Ray.

    Returns the precision that `auto` stands for there.

    Raises:
        UserError: resources are missing (says demand, supply and shortfall); or no Ray answers at the address; or the
            optimizer is to be offloaded from GPUs, and there is none.
    """
    if address := cluster_address(config):
        nodes = nodes_at(address)
        on_gpu = check_nodes(config, nodes, f"the cluster at {address}")
        computing = [node for node, there in nodes.items() if there.get("CPU")]
        auto = auto_on_nodes([node for node in computing if not nodes[node].get(_BFLOAT16)], len(computing))
    else:
        gpus = 0 if config.engines.device == "cpu" else _gpus_here()
        on_gpu, auto = _on_gpu(config, gpus), auto_here()
        # Our own Ray is started with as much of all other resources as is needed.
        check_nodes(config, {"here": total(demands(config, on_gpu=on_gpu)) | {"GPU": gpus}}, "this machine")
        if not on_gpu:
            _check_cores(config)
    if config.consolidate.offload_optimizer and not on_gpu:
        raise UserError("consolidate.offload_optimizer=true means nothing on CPUs: leave it out")
    return Auto(precision="bfloat16", because="engines and trainer use GPUs") if on_gpu else auto


@contextmanager
def ray_cluster(config: RunConfig, run_id: str, note: Callable[[str], None]) -> Iterator[bool]:
    """Join or start a Ray cluster for the time of a run. Yields whether engines and trainer use GPUs.

    Raises:
        UserError: the joined cluster is too small; says by how much.
    """
    import ray
    from ray.job_config import JobConfig

    on_sigterm = signal.getsignal(signal.SIGTERM)
    settings: dict[str, Any] = {
        "namespace": f"oel-{run_id}",
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": _worker_environment(config)},
    }
    # Set for our actors only, through the job, because with `ray.init` the driver would log to the terminal as well.
    settings["job_config"] = JobConfig()
    settings["job_config"].set_py_logging_config(ray.LoggingConfig(encoding=config.cluster.logs.upper()))
    if address := cluster_address(config):
        ray.init(address=address, **settings)
    else:
        gpus = 0 if config.engines.device == "cpu" else _gpus_here()
        needed = total(demands(config, on_gpu=_on_gpu(config, gpus)))
        settings |= ray_options({kind: math.ceil(amount) for kind, amount in needed.items()})
        ray.init(address="local", include_dashboard=config.cluster.dashboard, **settings)
        note(f"started Ray on this machine with {needed['CPU']:g} logical CPUs on {os.cpu_count()} cores")
    # Ray's own handler prints a stack, and the process dies without releasing the lock of the run folder.
    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield check_nodes(config, alive_nodes(), "the Ray cluster")
    finally:
        ray.shutdown()


def alive_nodes(*, processors: bool = False) -> dict[str, dict[str, float]]:
    """Ask the nodes of the joined cluster for their resources, by node id, with GPU memory if a node answers in time.

    With `processors` also ask whether their processors have bfloat16 instructions.
    """
    import ray

    nodes = {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}
    with_gpus: dict[str, tuple[Any, ...]] = {node: () for node, there in nodes.items() if there.get("GPU")}
    for node, gpus in ask_nodes(gpu_memory, with_gpus, _NODES_ANSWER_S).items():
        nodes[node][GPU_MEMORY] = min(gpus, default=0) if isinstance(gpus, list) else 0
    asked: dict[str, tuple[Any, ...]] = dict.fromkeys(nodes, ()) if processors else {}
    for node, units in ask_nodes(bfloat16_units, asked, _NODES_ANSWER_S).items():
        nodes[node][_BFLOAT16] = float(isinstance(units, list) and bool(units))
    return nodes


def ask_nodes(question: Callable[..., Any], asked: Mapping[str, tuple[Any, ...]], timeout_s: float) -> dict[str, Any]:
    """Call a function on each node of the joined cluster. The result is Ray's error if the call failed or was late.

    `asked`: the arguments for each node, by node id.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task, end, answers = ray.remote(num_cpus=0, max_retries=0)(question), time.monotonic() + timeout_s, {}
    for node, arguments in asked.items():
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        answers[node] = task.options(scheduling_strategy=there).remote(*arguments)
    for node, answer in answers.items():
        try:
            answers[node] = ray.get(answer, timeout=max(end - time.monotonic(), 0.01))
        except ray.exceptions.RayError as error:
            answers[node] = error
    return answers


def gpu_memory() -> list[float]:
    """List the bytes of memory of every GPU of this machine, also of those that this process may not use."""
    if not (tool := shutil.which("nvidia-smi")):
        return []
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    said = subprocess.run(query, capture_output=True, text=True, timeout=_NODES_ANSWER_S, check=False)
    return [float(line) * 2**20 for line in said.stdout.split() if line.isdigit()]


def cluster_address(config: RunConfig) -> str | None:
    """Find the address of the cluster to join; None for our own Ray. A job joins the cluster that it was submitted to.

    Raises:
        UserError: this is a job, and the configuration names another cluster.
    """
    asked = config.cluster.address
    if asked not in (None, "auto") and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UserError(f"cluster.address={asked}, and this job runs on the cluster it was submitted to: leave it out")
    address = asked or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


def _all(nodes: Nodes, kind: str) -> float:
    return sum(node.get(kind, 0) for node in nodes.values())


def _on_gpu(config: RunConfig, gpus: float) -> bool:
    return config.engines.device == "cuda" or (config.engines.device == "auto" and gpus > 0)


def nodes_at(address: str) -> Nodes:
    """Ask for the resources of the nodes of the Ray cluster at an address.

    Asks in a separate process, because `ray.init` waits ten minutes and more for a dead address.
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
        command = [sys.executable, "-P", "-c", _ASK, address]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=CLUSTER_ANSWER_S, check=True)
    except subprocess.TimeoutExpired:
        raise UserError(f"{unanswered} within {CLUSTER_ANSWER_S:.0f} s: {remedy}") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        raise UserError(f"{unanswered} ({said[-1]}): {remedy}") from None
    nodes: dict[str, dict[str, float]] = json.loads(asked.stdout.splitlines()[-1])
    return nodes


def check_nodes(config: RunConfig, nodes: Nodes, where: str) -> bool:
    """Compare the demand of a run with the resources of nodes. Returns whether engines and trainer would use GPUs.

    Raises:
        UserError: resources are missing; says demand, supply and shortfall.
    """
    on_gpu = _on_gpu(config, _all(nodes, "GPU"))
    wanted = demands(config, on_gpu=on_gpu)
    _, left = place(wanted, nodes)
    if left:
        short = [
            f"the run needs {amount:g} {kind}s and {where} has {there:g}: add {amount - there:g}"
            for kind, amount in total(wanted).items()
            if amount > (there := _all(nodes, kind))
        ] or [f"{where} has enough in all, but no node with room left for {amounts(left)}: take larger nodes"]
        cpu_only = ", or set engines.device=cpu" if on_gpu else ""
        raise UserError(
            f"{'; '.join(short)}, or lower engines.count, collect.players, engines.tensor_parallel or "
            f"consolidate.workers{cpu_only}; demand: {', '.join(map(str, wanted))}; supply: {placement(wanted, nodes)}"
        )
    return on_gpu


def _check_cores(config: RunConfig) -> None:
    """Check that there is a core for every engine thread, and one for every rank.

    Engines and ranks never work at once.
    """
    cores = len(os.sched_getaffinity(0))
    for demand in demands(config, on_gpu=False):
        wanted = demand.actors * demand.each["CPU"]
        if demand.pool in ("engines", "trainer") and wanted > cores:
            raise UserError(
                f"{demand} needs {wanted:g} cores and this machine has {cores}, {wanted - cores:g} too few: lower "
                "engines.count, engines.cpu_threads or consolidate.workers, or join a larger cluster (cluster.address)"
            )


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def _worker_environment(config: RunConfig) -> dict[str, str]:
    environment = {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        HANG_FOLDER: os.environ.get(HANG_FOLDER, ""),
        "HF_HUB_OFFLINE": "1",  # the driver has downloaded all files already
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # a rank imports torch before it is up
    }
    if config.engines.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    return environment
