"""Policies that answer when a condition is met."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from oel_ray.records import Generation, Sampling
from tests.support.scripted import generation


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
        while key in self.asked and not self.gate.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # another process makes the file
        self.asked.add(key)
        if key in self.failing:
            raise RuntimeError("no engine answers\nand more")
        return generation(f"- EXPERIENCE ITEM: {key} {seed}")
