"""How benchmarks measure and what they print. The process of a benchmark, and a child of it per measure of memory.

Every benchmark compares two ways of doing the same, side by side in one run, and its last line is one JSON object.
"""

import atexit
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Pairs:
    """The same measure of two ways, pair by pair."""

    above: tuple[float, ...]
    below: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return statistics.median(self.above) / statistics.median(self.below)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest ratio of a pair."""
        ratios = [above / below for above, below in zip(self.above, self.below, strict=True)]
        return min(ratios), max(ratios)

    def medians(self, above: str, below: str, digits: int = 3) -> dict[str, float]:
        """Of each way, under its name."""
        ways = ((above, self.above), (below, self.below))
        return {name: round(statistics.median(measures), digits) for name, measures in ways}


def measure_pairs(above: Callable[[], float], below: Callable[[], float], runs: int) -> Pairs:
    """Both measures `runs` times. Which of a pair comes first is drawn each time, so that drift favours neither."""
    measures: tuple[list[float], list[float]] = ([], [])
    ways = (above, below)
    for _ in range(runs):
        for index in random.sample((0, 1), 2):
            measures[index].append(ways[index]())
    return Pairs(tuple(measures[0]), tuple(measures[1]))


def seconds(function: Callable[[], object], device: str) -> float:
    """Wall time of one call, with all that it leaves running on a GPU."""
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    """Until a GPU has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def transient_bytes(setup: str, device: str, arguments: dict[str, Any]) -> int:
    """How far a function's peak memory rises above what is held before it is called, in a process of its own.

    `setup` is "module:name" of a function that takes the `arguments`, allocates and touches what is not to be counted,
    and returns the function to be measured.
    """
    task = json.dumps({"setup": setup, "device": device, "arguments": arguments})
    command = [sys.executable, "-m", "benchmarks.harness", task]
    # glibc gives back what it has mapped for one block alone: with its own threshold that is only blocks of 32 MiB.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(child.stdout.splitlines()[-1])


def rise(function: Callable[[], object], device: str) -> int:
    """How far this process's peak memory rises above what it holds, during one call; on a GPU, that of its tensors.

    On a CPU it is resident memory, where blocks that were freed and not given back come for nothing, or stay on top:
    that is why `transient_bytes` asks a fresh process. It is not `ru_maxrss`, which a child inherits from its parent.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is held now
    before = _peak_resident()
    function()
    return _peak_resident() - before


@contextmanager
def one_rank(device: str) -> Iterator[None]:
    """A process group of this process alone, and what DeepSpeed wants to find in the environment.

    The group stays until the process ends, since DeepSpeed keeps what it has made of it. The environment does not, or
    other trainers would take this process for one of several.
    """
    before = dict(os.environ)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    try:
        if not dist.is_initialized():
            backend = "nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            atexit.register(dist.destroy_process_group)
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def machine(device: str) -> str:
    """What the figures were measured on."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def result(name: str, pairs: Pairs, goal: str, machine: str, **details: Any) -> dict[str, Any]:
    """The object that a benchmark's last line shows. `goal` is what the ratio shall be at the benchmark's own size."""
    return {
        "name": name,
        "ratio": round(pairs.ratio, 3),
        "goal": goal,
        "spread": [round(ratio, 3) for ratio in pairs.spread],
        "runs": len(pairs.above),
        "machine": machine,
        **details,
    }


def _peak_resident() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024


def _child(task: dict[str, Any]) -> int:
    module, name = task["setup"].split(":")
    function = getattr(import_module(module), name)(**task["arguments"])
    if task["device"] == "cuda":
        function()  # the workspaces of cuBLAS stay, and are nobody's
    return rise(function, task["device"])


if __name__ == "__main__":
    print(_child(json.loads(sys.argv[1])))
