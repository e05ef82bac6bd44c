"""Policies that follow a script, instead of engines. Picklable, for tests that need them in a Ray actor."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from oel_ray.records import Generation, Sampling
from oel_ray.text.chat import ChatFormat

SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_tokens=64)


@dataclass(frozen=True)
class Request:
    prompt_ids: list[int]
    sampling: Sampling
    seed: int
    key: str


def generation(text: str) -> Generation:
    """A response of one token a byte, and an end token."""
    return Generation(token_ids=[*text.encode(), 0], text=text, finish_reason="stop", weight_version="1.0.0")


def item(key: str, index: int) -> str:
    return f"- EXPERIENCE ITEM: fact {index} of {key}"


@dataclass
class ScriptedGenerate:
    """Answers the i-th request of a key with `script(key, i)`, and remembers what it was asked.

    A script that is a list gives its answers in turn, the last one again and again.
    """

    script: Callable[[str, int], str] | Sequence[str] = item
    requests: list[Request] = field(default_factory=list)

    async def __call__(self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, key: str) -> Generation:
        index = sum(request.key == key for request in self.requests)
        self.requests.append(Request(list(prompt_ids), sampling, seed, key))
        await asyncio.sleep(0)
        if callable(self.script):
            return generation(self.script(key, index))
        return generation(self.script[min(index, len(self.script) - 1)])


@dataclass
class PromptedGenerate:
    """Answers with a function of the prompt's text, as a policy does."""

    chat: ChatFormat
    answer: Callable[[str], str]

    async def __call__(self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, key: str) -> Generation:
        return generation(self.answer(self.chat.tokenizer.decode(prompt_ids)))
