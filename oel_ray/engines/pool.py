"""The engine pool. `EnginePool` is the one control actor that owns the replicas; `PoolClient` is what players, chains
and training ranks hold; `engine_pool` runs in the driver.

Requests go straight from a client to an engine; the pool only says which one. It is asked for a lease before and told
after, so it knows the tokens in flight on every engine, and its answers never wait behind generation or a sync.
"""

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError

from oel_ray.config import EnginesConfig
from oel_ray.engines.engine import Engine
from oel_ray.errors import EngineUnavailable, RunFailed
from oel_ray.records import Generation, Sampling

POOL_NAME = "engine-pool"
DIED = (RayActorError, OutOfMemoryError)
"""How a call ends whose actor is gone; the second if Ray ended it to save the machine."""
_REMEMBERED = 100_000
_CONTROL_DEADLINE_S = 60.0


@dataclass
class Replica:
    """One engine as the pool sees it. `load` counts the tokens of its requests in flight, prompts and responses."""

    index: int
    handle: Any
    load: int = 0
    healthy: bool = True


@dataclass
class Router:
    """Which replica serves a key: the one that served it last, unless it is much busier than the least busy one."""

    replicas: list[Replica]
    _home: OrderedDict[str, int] = field(default_factory=OrderedDict)

    def pick(self, key: str, tokens: int) -> Replica:
        """The replica for a request of `tokens` tokens; counts them as its load.

        Raises:
            EngineUnavailable: no healthy replica is left.
        """
        healthy = [replica for replica in self.replicas if replica.healthy]
        if not healthy:
            raise EngineUnavailable("no healthy engine is left")
        idlest = min(healthy, key=lambda replica: replica.load)
        home = self.replicas[self._home[key]] if key in self._home else idlest
        # A prefix hit is worth a wait, but not any wait: beyond twice the least load the request moves.
        chosen = home if home.healthy and home.load <= 2 * idlest.load + tokens else idlest
        self._home[key] = chosen.index
        self._home.move_to_end(key)
        if len(self._home) > _REMEMBERED:
            self._home.popitem(last=False)
        chosen.load += tokens
        return chosen


class EnginePool:
    """The control actor. State: the replicas, their health, the leases on them, which key lives where."""

    def __init__(self, config: EnginesConfig, *, on_gpu: bool, engine: type = Engine) -> None:
        self._config = config
        self._on_gpu = on_gpu
        self._engine = engine
        self._router = Router([])
        self._leases: dict[str, tuple[Replica, int]] = {}
        self._given_back_early: OrderedDict[str, None] = OrderedDict()

    async def start(self, policy: str) -> None:
        """Start all replicas on a policy folder, side by side.

        Raises:
            RunFailed: a replica did not start; says why.
        """
        config = self._config
        resources = {"num_gpus": config.tensor_parallel} if self._on_gpu else {"num_cpus": config.cpu_threads}
        actor = ray.remote(max_concurrency=10_000, **resources)(self._engine)
        replicas = [
            Replica(index, actor.options(name=f"engine-{index}").remote(index, config, policy, on_gpu=self._on_gpu))
            for index in range(config.count)
        ]
        self._router = Router(replicas)  # before they run, so that `shutdown` reaches those that do
        await self._on_all(replicas, "start", deadline_s=config.start_deadline_s)

    async def deploy(self, policy: str, version: str) -> None:
        """Load a policy folder into every replica and label it."""
        await self._on_all(
            self._router.replicas, "load_policy", policy, version, deadline_s=self._config.sync_deadline_s
        )

    def lease(self, lease: str, key: str, tokens: int) -> Any:
        """Handle of the replica for a request. Give the lease, whose name the client made up, back with `release`.

        Raises:
            EngineUnavailable: no healthy replica is left.
        """
        if lease in self._given_back_early:
            del self._given_back_early[lease]
            raise EngineUnavailable("the request was given up before its lease was granted")
        replica = self._router.pick(key, tokens)
        self._leases[lease] = (replica, tokens)
        return replica.handle

    def release(self, lease: str, *, failed: bool = False) -> None:
        """Take a lease back; with `failed`, its replica gets no more requests. One that was never given is no error."""
        if lease not in self._leases:
            # Calls to an async actor may overtake each other, so that the lease may yet be asked for.
            self._given_back_early[lease] = None
            if len(self._given_back_early) > _REMEMBERED:
                self._given_back_early.popitem(last=False)
            return
        replica, tokens = self._leases.pop(lease)
        replica.load -= tokens
        replica.healthy = replica.healthy and not failed

    def engines(self) -> list[Any]:
        """Handles of all replicas, in order: the receivers of a weight sync.

        Raises:
            EngineUnavailable: a replica is dead, so that a sync cannot reach all.
        """
        dead = [replica.index for replica in self._router.replicas if not replica.healthy]
        if dead:
            raise EngineUnavailable(f"engines {dead} are dead")
        return [replica.handle for replica in self._router.replicas]

    async def shutdown(self) -> None:
        for replica in self._router.replicas:
            replica.healthy = False
        await asyncio.wait_for(
            asyncio.gather(*(r.handle.shutdown.remote() for r in self._router.replicas), return_exceptions=True),
            _CONTROL_DEADLINE_S,
        )

    async def _on_all(self, replicas: Sequence[Replica], method: str, *args: Any, deadline_s: float) -> None:
        calls = [getattr(replica.handle, method).remote(*args) for replica in replicas]
        try:
            await asyncio.wait_for(asyncio.gather(*calls), deadline_s)
        except RayTaskError:  # before TimeoutError: what an engine raises also is of the class of its cause
            raise
        except TimeoutError:
            raise EngineUnavailable(f"an engine did not finish '{method}' within {deadline_s:.0f} s") from None


class PoolClient:
    """`Generate` through the pool. Small and picklable: holds only the pool's handle."""

    def __init__(self, pool: Any, deadline_s: float) -> None:
        self._pool = pool
        self._deadline_s = deadline_s

    async def __call__(self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, key: str) -> Generation:
        """One response. The request of an engine that died or missed the deadline goes to another one.

        Raises:
            EngineUnavailable: none is left that could answer.
        """
        tokens = len(prompt_ids) + sampling.max_tokens
        while True:
            # The lease has a name before it is given: a client that is cancelled meanwhile can give it back, too.
            lease, failed = uuid.uuid4().hex, False
            try:
                engine = await self._lease(lease, key, tokens)
                return await self._generate(engine, prompt_ids, sampling, seed)
            except _EngineFailed:
                failed = True
            finally:
                self._pool.release.remote(lease, failed=failed)

    async def _lease(self, lease: str, key: str, tokens: int) -> Any:
        try:
            return await asyncio.wait_for(self._pool.lease.remote(lease, key, tokens), _CONTROL_DEADLINE_S)
        except RayTaskError as error:
            raise _plain(error) from None
        except (*DIED, TimeoutError):
            raise EngineUnavailable("the engine pool does not answer") from None

    async def _generate(self, engine: Any, prompt_ids: Sequence[int], sampling: Sampling, seed: int) -> Generation:
        call = engine.generate.remote(list(prompt_ids), sampling, seed, self._deadline_s)
        try:
            generation: Generation = await asyncio.wait_for(call, self._deadline_s + _CONTROL_DEADLINE_S)
        except asyncio.CancelledError:
            ray.cancel(call)
            raise
        # What an engine raises reaches us as a RayTaskError that also is of the class of its cause.
        except (*DIED, EngineUnavailable, TimeoutError) as error:
            raise _EngineFailed from error
        return generation


class _EngineFailed(Exception):
    """A request failed because of its engine, so that another engine may answer it."""


@dataclass(frozen=True)
class Pool:
    """The pool as the driver holds it."""

    actor: Any
    config: EnginesConfig

    @property
    def client(self) -> PoolClient:
        return PoolClient(self.actor, self.config.generate_deadline_s)

    def deploy(self, policy: Path, version: str) -> None:
        """Serve the policy of a folder, under a version label, from all engines.

        Raises:
            EngineUnavailable: not all engines took it within the deadline.
        """
        _wait(self.actor.deploy.remote(str(policy), version), self.config.sync_deadline_s + _CONTROL_DEADLINE_S)

    def engines(self) -> list[Any]:
        """Handles of all replicas: the receivers of weight syncs."""
        handles: list[Any] = _wait(self.actor.engines.remote(), _CONTROL_DEADLINE_S)
        return handles


@contextmanager
def engine_pool(config: EnginesConfig, policy: Path, *, on_gpu: bool, engine: type = Engine) -> Iterator[Pool]:
    """Start a pool on a policy folder; at the end no process of it is left.

    Raises:
        RunFailed: an engine did not start; the message says why.
    """
    actor = ray.remote(EnginePool).options(name=POOL_NAME, num_cpus=0, max_concurrency=10_000)
    handle = actor.remote(config, on_gpu=on_gpu, engine=engine)
    try:
        _wait(handle.start.remote(str(policy)), config.start_deadline_s + _CONTROL_DEADLINE_S)
        yield Pool(handle, config)
    finally:
        with suppress(RunFailed):  # what does not stop by itself is ended with its actor
            _wait(handle.shutdown.remote(), 2 * _CONTROL_DEADLINE_S)
        ray.kill(handle)


def _wait(reference: Any, timeout_s: float) -> Any:
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError:
        raise EngineUnavailable(f"the engine pool did not answer within {timeout_s:.0f} s") from None
    except RayTaskError as error:
        raise _plain(error) from error
    except DIED as error:
        raise EngineUnavailable(f"the engine pool died: {_first_line(error)}") from error


def _plain(error: RayTaskError) -> RunFailed:
    """What went wrong in an actor, without Ray's account of how it got here."""
    cause = error.cause
    if isinstance(cause, RayTaskError):
        return _plain(cause)
    if isinstance(cause, RunFailed):
        return cause
    if isinstance(cause, DIED):
        return EngineUnavailable(f"an engine died: {_first_line(cause)}")
    return RunFailed(f"engines: {type(cause).__name__}: {_first_line(cause)}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
