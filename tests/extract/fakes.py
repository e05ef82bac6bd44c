"""Engines that follow a script. Picklable where a test needs them in a Ray actor."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from oel_ray.records import Generation, Sampling


@dataclass(frozen=True)
class Request:
    prompt_ids: list[int]
    sampling: Sampling
    seed: int
    key: str


def generation(text: str, tokens: int = 5) -> Generation:
    return Generation(token_ids=list(range(tokens)), text=text, finish_reason="stop", weight_version="1.0.0")


@dataclass
class ScriptedGenerate:
    """Answers the i-th request of a key with `script(key, i)` and remembers all requests."""

    script: Callable[[str, int], str] = lambda key, index: f"- EXPERIENCE ITEM: fact {index} of {key}"
    requests: list[Request] = field(default_factory=list)

    async def __call__(self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, key: str) -> Generation:
        index = sum(request.key == key for request in self.requests)
        self.requests.append(Request(list(prompt_ids), sampling, seed, key))
        await asyncio.sleep(0)
        return generation(self.script(key, index))


@dataclass
class AllMustAsk:
    """Answers nobody until `parties` different keys have asked."""

    parties: int
    keys: set[str] = field(default_factory=set)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, key: str) -> Generation:
        self.keys.add(key)
        if len(self.keys) == self.parties:
            self.opened.set()
        await self.opened.wait()
        return generation(f"- EXPERIENCE ITEM: {key} {seed}")


@dataclass
class HeldAtSecondStep:
    """Answers each key once; the next answers wait until `gate` exists. Keys in `failing` raise instead."""

    gate: Path
    failing: tuple[str, ...] = ()
    asked: set[str] = field(default_factory=set)

    async def __call__(self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, key: str) -> Generation:
        while key in self.asked and not self.gate.exists():
            await asyncio.sleep(0.01)
        self.asked.add(key)
        if key in self.failing:
            raise RuntimeError("no engine answers\nand more")
        return generation(f"- EXPERIENCE ITEM: {key} {seed}")
