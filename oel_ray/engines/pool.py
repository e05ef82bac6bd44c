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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError

from oel_ray.config import EnginesConfig
from oel_ray.engines.engine import Engine
from oel_ray.engines.router import REMEMBERED, Replica, Router
from oel_ray.errors import EngineUnavailable, RunFailed, one_line
from oel_ray.records import Generation, Sampling

POOL_NAME = "engine-pool"
DIED = (RayActorError, OutOfMemoryError)
"""How a call ends whose actor is gone; the second if Ray ended it to save the machine."""
_CONTROL_DEADLINE_S = 60.0


class EnginePool:
    """The control actor. State: the replicas, their health, the leases on them, which key lives where, and the policy
    that replacements load.

    A replica that fails is ended and replaced; the new one gets the current weights and answers a canary before it
    serves. While a trainer sends weights they are known to it alone: what fails then is replaced when all engines are
    next asked for.
    """

    def __init__(
        self, config: EnginesConfig, *, on_gpu: bool, engine: type = Engine, router: type[Router] = Router
    ) -> None:
        self._config = config
        self._on_gpu = on_gpu
        self._engine = engine
        self._router = router([])
        self._leases: dict[str, tuple[Replica, int, Any]] = {}
        self._given_back_early: OrderedDict[str, None] = OrderedDict()
        self._policy, self._version = "", ""
        self._trainer_sends = False
        self._starts: dict[int, int] = {}
        self._replacements: dict[int, asyncio.Task[None]] = {}
        self._why_dead: dict[int, str] = {}

    async def start(self, policy: str) -> None:
        """Start all replicas on a policy folder, side by side.

        Raises:
            RunFailed: a replica did not start; says why.
        """
        self._policy = policy
        replicas = [Replica(index, self._new_engine(index)) for index in range(self._config.count)]
        self._router.replicas = replicas  # before they run, so that `shutdown` reaches those that do
        await self._on_all(replicas, "start", deadline_s=self._config.start_deadline_s)

    async def deploy(self, policy: str, version: str) -> None:
        """Load a policy folder into every replica and label it.

        Raises:
            EngineUnavailable: a replica died and could not be replaced, or the deadline passed.
        """
        await self._make_whole()
        await self._on_all(
            self._router.replicas, "load_policy", policy, version, deadline_s=self._config.sync_deadline_s
        )
        self._policy, self._version, self._trainer_sends = policy, version, False

    async def lease(self, lease: str, key: str, tokens: int) -> Any:
        """Handle of the replica for a request. Give the lease, whose name the client made up, back with `release`.

        Waits for a replacement if no healthy replica is left.

        Raises:
            EngineUnavailable: none is left, and none is coming.
        """
        while not any(replica.healthy for replica in self._router.replicas) and self._replacements:
            await asyncio.wait(list(self._replacements.values()), return_when=asyncio.FIRST_COMPLETED)
        if lease in self._given_back_early:
            del self._given_back_early[lease]
            raise EngineUnavailable("the request was given up before its lease was granted")
        try:
            replica = self._router.pick(key, tokens)
        except EngineUnavailable as error:
            why = "; ".join(self._why_dead.values())
            raise EngineUnavailable(f"{error} ({why})" if why else str(error)) from None
        self._leases[lease] = (replica, tokens, replica.handle)
        return replica.handle

    def release(self, lease: str, *, failed: bool = False) -> None:
        """Take a lease back; with `failed`, its replica gets no more requests. One that was never given is no error."""
        if lease not in self._leases:
            # Calls to an async actor may overtake each other, so that the lease may yet be asked for.
            self._given_back_early[lease] = None
            if len(self._given_back_early) > REMEMBERED:
                self._given_back_early.popitem(last=False)
            return
        replica, tokens, handle = self._leases.pop(lease)
        if replica.handle is not handle:
            return  # a replacement stands there by now, and none of this is its own
        replica.load -= tokens
        if failed:
            self._lose(replica)

    async def engines(self) -> list[Any]:
        """Handles of all replicas, in order, for a trainer that is going to send weights to them.

        Only at its start, when nothing else is asked of them: leases are those of a trainer that died.

        Raises:
            EngineUnavailable: a replica died and could not be replaced, so that a sync cannot reach all.
        """
        for lease in list(self._leases):
            self.release(lease)
        await self._make_whole()
        self._trainer_sends = True
        return [replica.handle for replica in self._router.replicas]

    def restarts(self) -> int:
        """How many replicas were replaced, or were to be, since the pool started."""
        return sum(self._starts.values()) - len(self._starts)

    async def shutdown(self) -> None:
        for task in self._replacements.values():
            task.cancel()
        for replica in self._router.replicas:
            replica.healthy = False
        await asyncio.wait_for(
            asyncio.gather(*(r.handle.shutdown.remote() for r in self._router.replicas), return_exceptions=True),
            _CONTROL_DEADLINE_S,
        )

    def _new_engine(self, index: int) -> Any:
        config = self._config
        started = self._starts[index] = self._starts.get(index, 0) + 1
        resources = {"num_gpus": config.tensor_parallel} if self._on_gpu else {"num_cpus": config.cpu_threads}
        actor = ray.remote(max_concurrency=10_000, **resources)(self._engine)
        name = f"engine-{index}" if started == 1 else f"engine-{index}-start-{started}"  # a killed actor's name lingers
        return actor.options(name=name).remote(index, config, self._policy, on_gpu=self._on_gpu)

    def _lose(self, replica: Replica) -> None:
        """Give up a replica; a replacement starts unless only a trainer knows the weights."""
        if replica.healthy:
            replica.healthy = False
            if not self._trainer_sends:
                self._replace(replica)

    def _replace(self, replica: Replica) -> None:
        index = replica.index
        task = self._replacements[index] = asyncio.create_task(self._replacement(replica))
        task.add_done_callback(lambda _: self._replacements.pop(index, None))

    async def _replacement(self, replica: Replica) -> None:
        """End a replica and start another in its place, as often as the budget allows."""
        config, index = self._config, replica.index
        while self._starts[index] <= config.max_restarts:
            ray.kill(replica.handle)  # with whatever still hangs in it
            replica.handle, replica.load = self._new_engine(index), 0
            try:
                await self._on_all([replica], "start", deadline_s=config.start_deadline_s)
                if self._version:
                    load = (self._policy, self._version)
                    await self._on_all([replica], "load_policy", *load, deadline_s=config.sync_deadline_s)
                await self._on_all([replica], "canary", deadline_s=_CONTROL_DEADLINE_S)
            except (RunFailed, RayTaskError, *DIED) as error:
                self._why_dead[index] = one_line(_plain(error) if isinstance(error, RayTaskError) else error, 0)
                continue
            replica.healthy = True
            self._why_dead.pop(index, None)
            return
        self._why_dead.setdefault(index, f"engine {index} died more than engines.max_restarts={config.max_restarts}")

    async def _make_whole(self) -> None:
        """Have every replica healthy: look at all of them, replace those that are not.

        Raises:
            EngineUnavailable: one could not be replaced.
        """
        await asyncio.gather(*map(self._look_at, self._router.replicas))
        for replica in self._router.replicas:
            if not replica.healthy and replica.index not in self._replacements:
                self._replace(replica)
        if self._replacements:
            await asyncio.wait(list(self._replacements.values()))
        if dead := [replica.index for replica in self._router.replicas if not replica.healthy]:
            raise EngineUnavailable(f"engines {dead} are dead: {'; '.join(self._why_dead[index] for index in dead)}")

    async def _look_at(self, replica: Replica) -> None:
        """Find out about a replica that died, or failed a weight sync, without a request to tell of it."""
        handle = replica.handle
        try:
            await asyncio.wait_for(handle.check_health.remote(), _CONTROL_DEADLINE_S)
        except (RayTaskError, *DIED, TimeoutError):
            if replica.handle is handle:
                replica.healthy = False

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

    def __init__(self, pool: Any, config: EnginesConfig) -> None:
        self._pool = pool
        self._deadline_s = config.generate_deadline_s
        self._lease_deadline_s = _healing_s(config)

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
            return await asyncio.wait_for(self._pool.lease.remote(lease, key, tokens), self._lease_deadline_s)
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
        return PoolClient(self.actor, self.config)

    def deploy(self, policy: Path, version: str) -> None:
        """Serve the policy of a folder, under a version label, from all engines.

        Raises:
            EngineUnavailable: not all engines took it within the deadline.
        """
        _wait(self.actor.deploy.remote(str(policy), version), self.config.sync_deadline_s + _healing_s(self.config))

    def engines(self) -> list[Any]:
        """Handles of all replicas, for a trainer that is going to send weights to them; replaces those that died.

        Raises:
            EngineUnavailable: one died and could not be replaced.
        """
        handles: list[Any] = _wait(self.actor.engines.remote(), _healing_s(self.config))
        return handles

    def restarts(self) -> int:
        """How many engines were replaced, or were to be, since the pool started."""
        count: int = _wait(self.actor.restarts.remote(), _CONTROL_DEADLINE_S)
        return count


@contextmanager
def engine_pool(
    config: EnginesConfig, policy: Path, *, on_gpu: bool, engine: type = Engine, router: type[Router] = Router
) -> Iterator[Pool]:
    """Start a pool on a policy folder; at the end no process of it is left.

    Raises:
        RunFailed: an engine did not start; the message says why.
    """
    actor = ray.remote(EnginePool).options(name=POOL_NAME, num_cpus=0, max_concurrency=10_000)
    handle = actor.remote(config, on_gpu=on_gpu, engine=engine, router=router)
    try:
        _wait(handle.start.remote(str(policy)), config.start_deadline_s + _CONTROL_DEADLINE_S)
        yield Pool(handle, config)
    finally:
        with suppress(RunFailed):  # what does not stop by itself is ended with its actor
            _wait(handle.shutdown.remote(), 2 * _CONTROL_DEADLINE_S)
        ray.kill(handle)


def _healing_s(config: EnginesConfig) -> float:
    """How long an answer of the pool may take that waits for a replica to be replaced."""
    return config.start_deadline_s + config.sync_deadline_s + 3 * _CONTROL_DEADLINE_S


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
