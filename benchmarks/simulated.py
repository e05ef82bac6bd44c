"""An engine without a model: it says texts that were recorded, after the time that continuous batching would take.

Runs as a Ray actor in the place of `Engine`, behind the real pool, so that what does not depend on a model can be
measured with more and faster engines than a machine has. `ContinuousBatch` and `PrefixCache` are pure, with no clock.
"""

import asyncio
import random
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any, NamedTuple

from oel_ray.config.schema import EnginesConfig
from oel_ray.errors import RunFailed
from oel_ray.records import Generation, Sampling


class Reply(NamedTuple):
    """A response to be said again: its text, and its ids with the end token."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Simulation:
    """What simulated engines say and how fast they are. The pace is assumed, not that of a machine.

    A step takes `decode_step_s`, and `decode_sequence_s` more for every running response, and gives each of these a
    token. The step that a prompt joins in is longer by its tokens over `prefill_tokens_per_s`, but for those that the
    prefix cache holds. Memory limits the cache and nothing else: no response waits for blocks or is preempted.
    """

    replies: tuple[Reply, ...]
    """Of these the seed of a request takes one, on every engine the same."""
    decode_step_s: float = 0.01
    decode_sequence_s: float = 0.0001
    prefill_tokens_per_s: float = 20_000.0
    cache_tokens: int = 100_000
    """Tokens of the prefix cache of one engine; the least recently used blocks go first."""
    block_size: int = 16


@dataclass(frozen=True)
class Counts:
    """What an engine has done; of `prompt_tokens`, `reused_tokens` came from its prefix cache."""

    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    response_tokens: int = 0


class PrefixCache:
    """Which blocks of tokens, each behind all that stands before it, an engine holds."""

    def __init__(self, tokens: int, block_size: int) -> None:
        self._capacity = tokens // block_size
        self._block_size = block_size
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def reusable(self, prompt_ids: Sequence[int]) -> int:
        """How many leading tokens of a prompt need not be computed: whole blocks, and never its last token."""
        hits = 0
        for block in self._blocks_of(prompt_ids[:-1]):
            if block not in self._blocks:
                break
            hits += 1
        return hits * self._block_size

    def hold(self, token_ids: Sequence[int]) -> None:
        """Hold all whole blocks of a text, the first ones longest: without them the others are of no use."""
        for block in reversed(list(self._blocks_of(token_ids))):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        self._blocks.clear()

    def _blocks_of(self, token_ids: Sequence[int]) -> Iterator[int]:
        chain = 0
        for end in range(self._block_size, len(token_ids) + 1, self._block_size):
            chain = hash((chain, tuple(token_ids[end - self._block_size : end])))
            yield chain


@dataclass(eq=False)
class Request:
    """A prompt and the response that it will get."""

    prompt_ids: Sequence[int]
    reply: Reply
    left: int = field(init=False)
    """Tokens of the response that are still to come."""

    def __post_init__(self) -> None:
        self.left = len(self.reply.token_ids)


class ContinuousBatch:
    """The requests of one engine, step by step. Callers say what time it is, and come again at `next_at`.

    Nothing happens between two steps in which a request joins or ends, so these are the only ones that are looked at.
    """

    def __init__(self, simulation: Simulation, slots: int) -> None:
        """`slots`: how many responses are written at a time."""
        self.cache = PrefixCache(simulation.cache_tokens, simulation.block_size)
        self.counts = Counts()
        self.next_at: float | None = None
        """When `advance` has something to tell next; None while there is nothing to do."""
        self._simulation = simulation
        self._slots = slots
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._since = 0.0
        self._steps = 0
        self._step_s = 0.0

    def add(self, request: Request, now: float) -> None:
        self._waiting.append(request)
        if self.next_at is None:
            self._begin(now)
        elif len(self._running) < self._slots:
            # It joins when the step that is under way has ended.
            self._steps = min(self._steps, max(ceil((now - self._since) / self._step_s), 1))
            self.next_at = self._since + self._steps * self._step_s

    def remove(self, request: Request) -> None:
        """Give a request up; nothing is known of it any more."""
        for requests in (self._waiting, self._running):
            if request in requests:
                requests.remove(request)

    def advance(self, now: float) -> list[Request]:
        """The requests whose responses have been complete since the last time."""
        ended: list[Request] = []
        while self.next_at is not None and self.next_at <= now:
            for request in self._running:
                request.left -= self._steps
            ended += [request for request in self._running if request.left <= 0]
            for request in [request for request in self._running if request.left <= 0]:
                self.cache.hold([*request.prompt_ids, *request.reply.token_ids])
            self._running = [request for request in self._running if request.left > 0]
            self._begin(self.next_at)
        return ended

    def _begin(self, now: float) -> None:
        """Let waiting requests join, and go on until the next one ends; a prompt is read in a step of its own."""
        joining = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._slots - len(self._running)))]
        to_read = sum(self._read(request) for request in joining)
        self._running += joining
        if not self._running:
            self.next_at = None
            return
        simulation = self._simulation
        self._since = now
        self._steps = 1 if joining else min(request.left for request in self._running)
        self._step_s = (
            simulation.decode_step_s
            + simulation.decode_sequence_s * len(self._running)
            + to_read / simulation.prefill_tokens_per_s
        )
        self.next_at = now + self._steps * self._step_s

    def _read(self, request: Request) -> int:
        """Tokens of a prompt that have to be computed."""
        prompt, before = request.prompt_ids, self.counts
        reused = self.cache.reusable(prompt)
        self.cache.hold(prompt)
        self.counts = Counts(
            before.requests + 1,
            before.prompt_tokens + len(prompt),
            before.reused_tokens + reused,
            before.response_tokens + len(request.reply.token_ids),
        )
        return len(prompt) - reused


class SimulatedEngine:
    """What players, chains and the pool need of an engine. It takes policies from folders and has no weights to sync.

    State: the requests in flight, the prefix cache, the version. `simulated` makes the class that a pool can start.
    """

    simulation: Simulation

    def __init__(self, index: int, config: EnginesConfig, policy: str, *, on_gpu: bool) -> None:
        self._index = index
        self._context = config.max_model_len
        self._version = "default"
        self._batch = ContinuousBatch(self.simulation, config.max_num_seqs)
        self._answers: dict[Request, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._serving = asyncio.Event()
        self._serving.set()

    async def start(self, version: str = "") -> None:
        self._version = version or self._version

    async def generate(self, prompt_ids: list[int], sampling: Sampling, seed: int, deadline_s: float) -> Generation:
        """One of the replies.

        Raises:
            TimeoutError: its time is not over within `deadline_s`; the request is given up.
            RunFailed: it is longer than `sampling` or the context allow.
        """
        reply = random.Random(seed).choice(self.simulation.replies)
        length = len(reply.token_ids)
        if length > sampling.max_tokens or len(prompt_ids) + length > self._context:
            raise RunFailed(f"engine {self._index}: a reply of {length} tokens is longer than a response may be")
        async with asyncio.timeout(deadline_s):
            await self._serving.wait()
            await self._written(Request(prompt_ids, reply))
        return Generation(
            token_ids=list(reply.token_ids), text=reply.text, finish_reason="stop", weight_version=self._version
        )

    async def _written(self, request: Request) -> None:
        loop = asyncio.get_running_loop()
        self._answers[request] = loop.create_future()
        self._wake()  # a timer may be late
        self._batch.add(request, loop.time())
        self._wake()
        try:
            await self._answers[request]
        finally:
            del self._answers[request]
            self._batch.remove(request)

    def _wake(self) -> None:
        """Hand out what is complete, and come again when something else will be."""
        loop = asyncio.get_running_loop()
        for request in self._batch.advance(loop.time()):
            if not self._answers[request].done():  # as it is if it was cancelled just now
                self._answers[request].set_result(None)
        if self._timer is not None:
            self._timer.cancel()
        next_at = self._batch.next_at
        self._timer = None if next_at is None else loop.call_at(next_at, self._wake)

    async def check_health(self) -> str:
        """The weight version that is served."""
        return self._version

    async def progress(self) -> None:
        """What could not answer has no event loop that would get here."""

    async def canary(self) -> None:
        """As `progress`."""

    async def load_policy(self, folder: str, version: str) -> None:
        """Let requests in flight finish, forget their prefixes, and serve under another version."""
        self._serving.clear()
        if self._answers:
            await asyncio.wait(list(self._answers.values()))
        self._batch.cache.clear()
        self._version = version
        self._serving.set()

    async def counts(self) -> dict[str, int]:
        """`Counts` since the start."""
        return asdict(self._batch.counts)

    async def shutdown(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def simulated(simulation: Simulation) -> Any:
    """The engine class of a simulation, as `engine_pool` takes one."""
    return type("SimulatedEngine", (SimulatedEngine,), {"simulation": simulation})
