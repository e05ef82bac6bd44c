"""A served engine as tests hold it: in this process or behind Ray, with a sender of weights and measures of parity."""

import asyncio
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import psutil
import ray
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.utils.network_utils import get_open_port

from oel_ray.engines.engine import Engine
from oel_ray.weights.plugin import register
from oel_ray.weights.send import GlooTrainerInitInfo, NamedTensors
from tests.support.tiny_engines import PROMPTS, plain_logprobs

DEADLINE_S = 120.0


class Served(Protocol):
    def call(self, method: str, *args: Any) -> Any:
        """The result of an engine's method."""


class InProcess:
    """An engine in this process, driven by an event loop in a thread. Also is the client of its own weight sync."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._version = ""

    def submit(self, method: str, *args: Any) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(getattr(self._engine, method)(*args), self._loop)

    def call(self, method: str, *args: Any) -> Any:
        return self.submit(method, *args).result(DEADLINE_S)

    def stop(self) -> None:
        self.call("shutdown")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()

    def sender(self, weights: Any) -> Any:
        """A sender in a group of its own."""
        register()
        info = GlooTrainerInitInfo("127.0.0.1", get_open_port(), 2, 60.0, rank=0)
        return WeightTransferTrainerFactory.trainer_init(info, client=self, source=NamedTensors(weights))

    def send(self, sender: Any, version: str) -> None:
        self._version = version
        sender.send_weights()

    # vLLM's `VLLMWeightSyncClient`.

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self.call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.call("finish_weight_update", weight_version or self._version)


class OnRay:
    """An engine that is a Ray actor."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def call(self, method: str, *args: Any) -> Any:
        return ray.get(getattr(self._handle, method).remote(*args), timeout=DEADLINE_S)


def warm(served: Served) -> int:
    """Ask all prompts, so that their blocks are cached; returns the fewest tokens that the cache then holds of one."""
    for ids in PROMPTS:
        served.call("cached_tokens", ids)
    return min(served.call("cached_tokens", ids) for ids in PROMPTS)


def top_error(served: Served, policy: Path, dtype: str) -> float:
    """Largest difference of log-probability to plain transformers, over the 20 likeliest tokens after all prompts."""
    errors = []
    for ids in PROMPTS:
        plain = plain_logprobs(policy, dtype, ids)[-1]
        top = served.call("logprobs", ids, 20)
        assert len(top) == 20
        errors += [abs(logprob - plain[token].item()) for token, logprob in top]
    return max(errors)


def sampled_error(served: Served, policy: Path, dtype: str) -> float:
    """Mean difference of log-probability to plain transformers, over 32 sampled tokens after every prompt."""
    errors = []
    for ids in PROMPTS:
        sampled = served.call("sampled_logprobs", ids, 32, 7)
        plain = plain_logprobs(policy, dtype, ids + [token for token, _ in sampled])[len(ids) - 1 :]
        errors += [abs(logprob - plain[i, token].item()) for i, (token, logprob) in enumerate(sampled)]
    return sum(errors) / len(errors)


def children() -> list[psutil.Process]:
    """All running processes below this one, but for Python's own resource tracker, which stays."""
    return [process for process in psutil.Process().children(recursive=True) if _runs(process, "resource_tracker")]


def assert_gone(processes: list[psutil.Process], within_s: float = 30.0) -> None:
    """A process that ended and was not yet waited for by whoever inherited it is gone, too."""
    until = time.monotonic() + within_s
    while (alive := [process for process in processes if _runs(process)]) and time.monotonic() < until:
        time.sleep(0.2)
    assert not alive, alive


def _runs(process: psutil.Process, but: str | None = None) -> bool:
    try:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        return but is None or but not in " ".join(process.cmdline())
    except psutil.Error:  # it ended while we looked
        return False
