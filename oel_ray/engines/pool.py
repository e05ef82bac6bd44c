"""Run the engine pool. `EnginePool` is the single control actor and owns the replicas. Players, chains and training
ranks hold a `PoolClient`. `engine_pool` runs in the driver.

Requests go straight from a client to an engine; the pool only chooses the engine. A client takes a lease before a
request and releases it after. So the pool knows the tokens in flight on every engine. Its answers never wait for
generation or a sync.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from cachetools import LRUCache
from ray.exceptions import RayTaskError
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from oel_ray.cluster.actors import DIED, failure
from oel_ray.cluster.demand import engine_takes, ray_options
from oel_ray.cluster.stacks import WATCH, Named, dump_stacks
from oel_ray.config.schema import EnginesConfig
from oel_ray.engines.client import CONTROL_DEADLINE_S, POOL_NAME, Pool, answer_of
from oel_ray.engines.engine import Engine
from oel_ray.engines.router import REMEMBERED, Replica, Router
from oel_ray.errors import EngineUnavailable, RunFailed
from oel_ray.telemetry.series import Series, enter, log, report


class EnginePool(Named):
    """The control actor. State: the replicas, their health, the leases on them, which key lives where, the policy that
    replacements load, and what has happened so far.

    A replica that fails or makes no progress is killed and replaced. The new one loads the current weights and answers
    a canary before it serves. During training only the trainer knows the weights. Replicas that fail then are killed at
    once, and replaced when `engines` is next called.
    """

    def __init__(
        self,
        config: EnginesConfig,
        places: Sequence[Any],
        *,
        on_gpu: bool,
        engine: type = Engine,
        router: type[Router] = Router,
    ) -> None:
        """`places`: a placement group for each replica, which keeps the resources reserved while it is replaced."""
        self._config = config
        self._places = places
        self._on_gpu = on_gpu
        self._engine = engine
        self._router = router([])
        self._leases: dict[str, tuple[Replica, int, Any, float]] = {}
        self._given_back_early: LRUCache[str, bool] = LRUCache(REMEMBERED)
        self._policy, self._version = "", ""
        self._trainer_sends = False
        self._counts: Counter[str] = Counter(engine_restarts=0)
        self._watching: asyncio.Task[None] | None = None

    async def start(self, policy: str) -> None:
        """Start all replicas on a policy folder, side by side.

        Raises:
            RunFailed: a replica did not start; says why.
        """
        self._policy = policy
        self.enter(0, "start")
        replicas = [Replica(index, self._new_engine(index, 1)) for index in range(self._config.count)]
        self._router.replicas = replicas  # before they run, so that `shutdown` reaches all
        await self._on_all(replicas, "start", self._version, deadline_s=self._config.start_deadline_s)
        for replica in replicas:
            self._mark(replica, healthy=True)
        self._watching = asyncio.create_task(self._watch())

    async def deploy(self, policy: str, version: str) -> None:
        """Load a policy folder into every replica and label it.

        A replica that misses the deadline is replaced by a new one, started from this policy.

        Raises:
            EngineUnavailable: a replica died and could not be replaced.
        """
        await self._make_whole()
        self._policy, self._version, self._trainer_sends = policy, version, False
        await asyncio.gather(*map(self._load, self._router.replicas))
        await self._make_whole()

    async def lease(self, lease: str, key: str, tokens: int) -> Any:
        """Return the handle of the replica for a request. The client chooses the lease's name and returns it by
        `release`.

        Waits for a replacement if no healthy replica is left.

        Raises:
            EngineUnavailable: no healthy replica is left, and none is being started.
        """
        while not any(replica.healthy for replica in self._router.replicas) and (coming := self._replacements()):
            await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
        if self._given_back_early.pop(lease, False):
            raise EngineUnavailable("the request was given up before its lease was granted")
        replica = self._router.pick(key, tokens)
        self._leases[lease] = (replica, tokens, replica.handle, time.monotonic())
        return replica.handle

    def release(self, lease: str, *, failed: bool = False, counts: Mapping[str, int] | None = None) -> None:
        """Take a lease back, with the counts of its request. A lease that was never granted is no error.

        With `failed`, its replica gets no more requests.
        """
        self._counts.update(counts or {})
        for name, count in (counts or {}).items():
            report(Series[name.upper()], count)
        if lease not in self._leases:
            # Calls of an async actor may overtake each other, so the request for this lease may still arrive.
            self._given_back_early[lease] = True
            return
        replica, tokens, handle, since = self._leases.pop(lease)
        report(Series.TURN_LATENCY, time.monotonic() - since if counts and "requests" in counts else None)
        if replica.handle is not handle:
            return  # meanwhile replaced; the replacement is not concerned
        replica.load -= tokens
        if failed:
            self._lose(replica)

    async def engines(self) -> list[Any]:
        """Return the handles of all replicas, in order, for a trainer that will send weights to them.

        Called only when a trainer starts. No requests are in flight then, so remaining leases belong to a trainer that
        died.

        Raises:
            EngineUnavailable: a replica died and could not be replaced, so a sync cannot reach all.
        """
        for lease in list(self._leases):
            self.release(lease)
        await self._make_whole()
        self._trainer_sends = True
        return [replica.handle for replica in self._router.replicas]

    def counts(self) -> dict[str, int]:
        """See `Pool.counts`."""
        return dict(self._counts)

    def enter(self, round_number: int, stage: str) -> None:
        """Label all later reports with a round and a stage."""
        enter(round_number, stage)

    async def shutdown(self) -> None:
        for task in filter(None, [self._watching, *self._replacements()]):
            task.cancel()
        for replica in self._router.replicas:
            self._mark(replica, healthy=False)
        await asyncio.wait_for(
            asyncio.gather(*(r.handle.shutdown.remote() for r in self._router.replicas), return_exceptions=True),
            CONTROL_DEADLINE_S,
        )

    def _new_engine(self, index: int, start: int) -> Any:
        config = self._config
        takes = engine_takes(config, on_gpu=self._on_gpu)
        groups: dict[str, Any] = {"max_concurrency": 10_000, "concurrency_groups": {WATCH: 1}}
        actor = ray.remote(**groups, **ray_options(takes))(self._engine)
        name = f"engine-{index}" if start == 1 else f"engine-{index}-start-{start}"  # a killed actor's name lingers
        place = PlacementGroupSchedulingStrategy(self._places[index])
        options = actor.options(name=name, scheduling_strategy=place)
        return options.remote(index, config, self._policy, on_gpu=self._on_gpu)

    def _mark(self, replica: Replica, *, healthy: bool) -> None:
        replica.healthy = healthy
        report(Series.ENGINE_HEALTHY, healthy, engine=str(replica.index), round="", stage="")

    def _lose(self, replica: Replica) -> None:
        """Give up a replica, and start a replacement unless only a trainer knows the weights."""
        if replica.healthy:
            self._mark(replica, healthy=False)
            log.warning("engine %d is given up", replica.index)
            if self._trainer_sends:
                ray.kill(replica.handle)  # so that its clients turn to another one now
            else:
                self._replace(replica)

    def _replace(self, replica: Replica) -> None:
        replica.replacement = asyncio.create_task(self._replacement(replica))

    def _replacements(self) -> list[asyncio.Task[None]]:
        return [replica.replacement for replica in self._router.replicas if replica.replacement]

    async def _replacement(self, replica: Replica) -> None:
        """Kill a replica and start another in its place, as often as the budget allows."""
        config = self._config
        try:
            while replica.starts <= config.max_restarts:
                ray.kill(replica.handle)  # with its hung requests
                self._counts["engine_restarts"] += 1
                report(Series.ENGINE_RESTARTS, 1)
                replica.starts += 1
                replica.handle, replica.load = self._new_engine(replica.index, replica.starts), 0
                try:
                    await self._on_all([replica], "start", self._version, deadline_s=config.start_deadline_s)
                    await self._on_all([replica], "canary", deadline_s=CONTROL_DEADLINE_S)
                except (RunFailed, RayTaskError, *DIED) as error:
                    replica.why_dead = failure(error)
                    continue
                self._mark(replica, healthy=True)
                replica.why_dead = ""
                return
            died_often = f"engine {replica.index} died more than engines.max_restarts={config.max_restarts}"
            replica.why_dead = replica.why_dead or died_often
        finally:
            replica.replacement = None

    async def _make_whole(self) -> None:
        """Check all replicas and replace the unhealthy ones.

        Raises:
            EngineUnavailable: a replica could not be replaced.
        """
        replicas = self._router.replicas
        await asyncio.gather(*(self._look_at(replica, "check_health") for replica in replicas if replica.healthy))
        for replica in replicas:
            if not replica.healthy and not replica.replacement:
                self._replace(replica)
        if coming := self._replacements():
            await asyncio.wait(coming)
        if dead := [replica for replica in replicas if not replica.healthy]:
            indices, reasons = [replica.index for replica in dead], "; ".join(replica.why_dead for replica in dead)
            raise EngineUnavailable(f"engines {indices} are dead: {reasons}")

    async def _load(self, replica: Replica) -> None:
        """Load the current policy into a replica, and give it up if it dies meanwhile or misses the deadline."""
        load, deadline_s = (self._policy, self._version), self._config.sync_deadline_s
        try:
            await self._on_all([replica], "load_policy", *load, deadline_s=deadline_s)
        except (EngineUnavailable, *DIED):
            self._lose(replica)

    async def _watch(self) -> None:
        """Watch for replicas that died or make no progress, because no request may reveal them."""
        while True:
            await asyncio.sleep(self._config.stall_deadline_s / 2)
            healthy = [replica for replica in self._router.replicas if replica.healthy]
            await asyncio.gather(*(self._look_at(replica, "progress") for replica in healthy))

    async def _look_at(self, replica: Replica, question: str) -> None:
        """Give up a replica that does not answer a call in time."""
        handle = replica.handle
        try:
            await asyncio.wait_for(getattr(handle, question).remote(), self._config.stall_deadline_s)
        except (RayTaskError, *DIED, TimeoutError) as error:
            if type(error) is TimeoutError:
                await asyncio.to_thread(dump_stacks)
            if replica.handle is handle:
                self._lose(replica)

    async def _on_all(self, replicas: Sequence[Replica], method: str, *args: Any, deadline_s: float) -> None:
        calls = [getattr(replica.handle, method).remote(*args) for replica in replicas]
        try:
            await asyncio.wait_for(asyncio.gather(*calls), deadline_s)
        except RayTaskError:  # before TimeoutError, because an engine's error is also of its cause's class
            raise
        except TimeoutError:
            await asyncio.to_thread(dump_stacks)
            raise EngineUnavailable(f"an engine did not finish '{method}' within {deadline_s:.0f} s") from None


@contextmanager
def engine_pool(
    config: EnginesConfig, policy: Path, *, on_gpu: bool, engine: type = Engine, router: type[Router] = Router
) -> Iterator[Pool]:
    """Start a pool on a policy folder, and end all its processes afterwards.

    Raises:
        RunFailed: an engine did not start; the message says why.
    """
    # On the driver's node, because the pool must not die with another node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(concurrency_groups={WATCH: 1}, num_cpus=0, max_concurrency=10_000)(EnginePool)
    start = actor.options(name=POOL_NAME, scheduling_strategy=here).remote
    takes = engine_takes(config, on_gpu=on_gpu)
    places = [placement_group([takes], "STRICT_PACK") for _ in range(config.count)]
    handle = start(config, places, on_gpu=on_gpu, engine=engine, router=router)
    try:
        answer_of(handle.start.remote(str(policy)), config.start_deadline_s + CONTROL_DEADLINE_S)
        yield Pool(handle, config)
    finally:
        with suppress(RunFailed):  # a replica that does not stop is killed with its actor
            answer_of(handle.shutdown.remote(), 2 * CONTROL_DEADLINE_S)
        ray.kill(handle)
        for place in places:
            remove_placement_group(place)
