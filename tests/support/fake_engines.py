"""Engines without vLLM, for tests of the pool. Run as Ray actors."""

import asyncio
import os
import time
from pathlib import Path

from oel_ray.config.schema import EnginesConfig
from oel_ray.errors import EngineUnavailable, RunFailed
from oel_ray.records import Generation, Sampling


class FakeEngine:
    """Answers at once, or in the manner that `behave` last asked for."""

    def __init__(self, index: int, config: EnginesConfig, policy: str, *, on_gpu: bool) -> None:
        self._index = index
        self._manner = "answer"
        self._cancelled = 0
        self._version = f"engine-{index}"

    async def start(self, version: str = "") -> None:
        self._version = version or self._version

    async def load_policy(self, folder: str, version: str) -> None:
        if self._manner == "never load":
            await asyncio.Event().wait()
        self._version = version

    async def progress(self) -> None:
        pass

    async def canary(self) -> None:
        pass

    async def check_health(self) -> str:
        if self._manner == "unwell":
            raise EngineUnavailable("a weight sync failed")
        return self._version

    async def shutdown(self) -> None:
        pass

    async def behave(self, manner: str) -> None:
        self._manner = manner

    async def cancelled(self) -> int:
        return self._cancelled

    async def generate(self, prompt_ids: list[int], sampling: Sampling, seed: int, deadline_s: float) -> Generation:
        match self._manner:
            case "die":
                os._exit(1)
            case "refuse":
                raise ValueError("the prompt is too long")
            case "stand still":  # not even the deadline is kept
                time.sleep(600)  # noqa: ASYNC251
            case "wait":
                try:
                    async with asyncio.timeout(deadline_s):
                        await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self._cancelled += 1
                    raise
        return Generation(token_ids=[seed], text="", finish_reason="stop", weight_version=self._version)


class WithoutMemory(FakeEngine):
    """The second one does not start, for a reason."""

    async def start(self, version: str = "") -> None:
        if self._index == 1:
            raise RunFailed("engine 1 did not start: ValueError: no memory for the cache")


class Breaking(FakeEngine):
    async def start(self, version: str = "") -> None:
        raise KeyError("first line\nsecond line")


class Dying(FakeEngine):
    async def start(self, version: str = "") -> None:
        os._exit(1)


class Endless(FakeEngine):
    async def start(self, version: str = "") -> None:
        await asyncio.sleep(600)


class OnlyOnce(FakeEngine):
    """Starts where no engine of its index has, by the files in the folder that it gets as policy."""

    def __init__(self, index: int, config: EnginesConfig, policy: str, *, on_gpu: bool) -> None:
        super().__init__(index, config, policy, on_gpu=on_gpu)
        self._mark = Path(policy) / f"started-{index}"

    async def start(self, version: str = "") -> None:
        if self._mark.exists():
            raise RunFailed(f"engine {self._index} did not start: no memory for the cache")
        self._mark.touch()


class Dumb(OnlyOnce):
    """Starts again, and does not answer its canary then."""

    async def start(self, version: str = "") -> None:
        self._again = self._mark.exists()
        self._mark.touch()

    async def canary(self) -> None:
        if self._again:
            raise RunFailed("wrote no token")


class Recording(FakeEngine):
    """Remembers the steps of weight syncs in the file that it gets as policy. Made to, it never gets an update."""

    def __init__(self, index: int, config: EnginesConfig, policy: str, *, on_gpu: bool) -> None:
        super().__init__(index, config, policy, on_gpu=on_gpu)
        self._file = Path(policy)

    def _note(self, line: str) -> None:
        with self._file.open("a") as file:
            file.write(f"{self._index} {line}\n")

    async def init_weight_transfer_engine(self, init_info: dict[str, int]) -> None:
        self._note(f"init {init_info['rank_offset']} of {init_info['world_size']}")

    async def start_weight_update(self) -> None:
        self._note("start")

    async def update_weights(self, update_info: dict[str, int]) -> None:
        self._note(f"update {update_info['names']}")
        if self._manner == "never update":
            self._manner = "unwell"  # as an engine is whose update is open
            await asyncio.Event().wait()
        if self._manner == "fail update":
            raise RuntimeError("incomplete weight sync:\nmissing ['lm_head.weight']")

    async def finish_weight_update(self, version: str) -> None:
        self._note(f"finish {version}")
