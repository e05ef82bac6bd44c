"""Find faults of this machine or of a cluster's nodes before anything is loaded (`oel doctor`).

The driver starts a small task on every live node. Without a cluster it checks its own machine.
"""

import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib import error, request
from urllib.parse import urlsplit

from oel_ray.cluster import session
from oel_ray.cluster.actors import failure
from oel_ray.config.schema import RunConfig
from oel_ray.errors import UserError
from oel_ray.formats import gib
from oel_ray.models.policy import check_model, check_teacher
from oel_ray.runs.folder import PACKAGES, installed

ANSWER_S = 60.0
"""Seconds that a node may take to answer, the import of transformers included."""
_GIB = 2**30
_SHARE = "give --run-dir on a file system that all nodes share, under the same path"


class Finding(NamedTuple):
    """A fault, its place and its remedy. An error would stop a run; a note might."""

    where: str
    what: str
    is_error: bool = True


def examine(config: RunConfig, run_dir: Path, note: Callable[[str], None]) -> list[Finding]:
    """Check the cluster that a run would join, or this machine, against the needs of the run.

    Raises:
        UserError: no cluster answers, or there is no such model.
    """
    config = config.model_copy(update={"model": str(check_model(config, note).folder)})
    above = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".oel-doctor-", dir=above) as name:
        folder, address = Path(name), session.cluster_address(config)
        if address:
            answers, faults = _ask_cluster(address, config, folder)
        else:
            faults = [_fault(lambda: session.check_resources(config))]
            answers = {"here": look(config, folder, "here", {}, None)}
        unseen = [node for node, found in answers.items() if isinstance(found, list) and not (folder / node).exists()]
    found = [Finding("the cluster" if address else "here", fault) for fault in faults if fault]
    found += [Finding(node[:12], f"what it writes to {above} is not seen here: {_SHARE}") for node in unseen]
    for node, answer in answers.items():
        no_answer = "gave no answer ({}): have oel-ray installed there, or take the node out"
        found += answer if isinstance(answer, list) else [Finding(node[:12], no_answer.format(failure(answer)))]
    return found


def versions() -> dict[str, str]:
    """List the installed versions of the packages that must be the same on all nodes."""
    return {"python": platform.python_version()} | installed(PACKAGES)


def look(config: RunConfig, folder: Path, node: str, others: Mapping[str, str], gpus: float | None) -> list[Finding]:
    """List the faults of this machine. Leaves a file named `node` in a folder that the driver has created.

    `others`: the driver's versions, to be compared. `gpus`: the number of GPUs that Ray counts here; None without Ray.
    """
    import resource

    import psutil

    with suppress(OSError):
        (folder / node).touch()
    ours = versions()
    wanted = {"oel-ray", "ray", "torch", "vllm", "transformers", "deepspeed"}
    lacking = wanted - {name.removesuffix("-cpu") for name in ours}
    other = [f"{name} {ours.get(name)} (driver: {there})" for name, there in others.items() if ours.get(name) != there]
    plugins = [point.value for point in metadata.entry_points(group="vllm.general_plugins")]
    disk, shm = (shutil.disk_usage(path).free for path in (folder if folder.exists() else "/", "/dev/shm"))  # noqa: S108
    memory, seen = psutil.virtual_memory().available, len(session.gpu_memory())
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    devices = (os.environ if gpus is None else psutil.Process().parent().environ()).get("CUDA_VISIBLE_DEVICES")
    model = _fault(lambda: check_teacher(config, check_model(config, _silent), _silent))
    ports = _fault(lambda: socket.create_server(("", 0)).close())
    checks: list[tuple[object, bool, str]] = [
        (lacking, True, f"lacks {', '.join(sorted(lacking))}: install oel-ray from its lock file or image"),
        ("oel_ray.weights.plugin:register" not in plugins, True, "lacks our plug-in for vLLM: install oel-ray there"),
        (other, True, f"has {', '.join(other)}: install the same everywhere"),
        (model, True, f"{model} (have the model under the same path on every node: oel prefetch)"),
        (ports, True, f"cannot listen on a port ({ports}): see what the container or a firewall forbids"),
        (gpus and gpus > seen, True, f"has {seen} GPUs and Ray counts {gpus}: see what nvidia-smi says there"),
        (devices, False, f"Ray was started with CUDA_VISIBLE_DEVICES={devices}: unset it, Ray hands out GPUs itself"),
        (disk < 20 * _GIB, False, f"has {gib(disk)} of disk left: make room, a checkpoint is 20 bytes a parameter"),
        (memory < 2 * _GIB, False, f"has {gib(memory)} of memory left: end what takes it"),
        (shm < _GIB, False, f"has {gib(shm)} of /dev/shm: give the container more (--shm-size, or a memory emptyDir)"),
        (files < 4096, False, f"opens {files} files at most: ulimit -n 65536 before ray start"),
    ]
    return [Finding(node[:12], text, is_error) for wrong, is_error, text in checks if wrong]


def is_open(dashboard: str) -> bool:
    """Tell whether other machines can use a dashboard (HOST:PORT) without a token."""
    if urlsplit(f"//{dashboard}").hostname in (None, "127.0.0.1", "localhost", "::1"):
        return False
    try:
        return bool(request.urlopen(f"http://{dashboard}/api/jobs/", timeout=5).status == 200)
    except (error.URLError, TimeoutError):
        return False


def _ask_cluster(address: str, config: RunConfig, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Collect the findings of all live nodes and of the cluster itself."""
    session.nodes_at(address)  # `ray.init` would wait for a dead one
    import ray

    offline = {"env_vars": {"HF_HUB_OFFLINE": "1"}}
    with ray.init(address=address, runtime_env=offline, log_to_driver=False, logging_level="ERROR") as context:
        dashboard, nodes = context.dashboard_url or "", session.alive_nodes()
        asked = {node: (config, folder, node, versions(), there.get("GPU", 0)) for node, there in nodes.items()}
        faults = [_fault(lambda: session.check_nodes(config, nodes, "it"))]
        if is_open(dashboard):
            faults.append(f"the dashboard at {dashboard} takes jobs from anybody: start Ray with RAY_AUTH_MODE=token")
        return session.ask_nodes(look, asked, ANSWER_S), faults


def package(config: str) -> list[Finding]:
    """Check that a configuration can be submitted as a job: the folder of its file must not be too large."""
    from oel_ray.cluster.submit import check_size, packed

    folder = Path(config).resolve().parent
    fault = _fault(lambda: check_size(folder, packed(folder))) if Path(config).is_file() else ""
    return [Finding("here", fault, is_error=False)] if fault else []


def _silent(text: str) -> None:
    pass


def _fault(check: Callable[[], object]) -> str:
    """Return the error of a check as a finding."""
    try:
        check()
    except (UserError, OSError) as fault:
        return str(fault)
    return ""
