"""Ask the pool for an engine, and generate on it. Runs wherever responses are needed; imports no engine."""

import asyncio
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from oel_ray.cluster.actors import DIED, failure, plain
from oel_ray.cluster.stacks import dump_stacks
from oel_ray.config.schema import EnginesConfig
from oel_ray.errors import EngineUnavailable
from oel_ray.records import Generation, Sampling

POOL_NAME = "engine-pool"
CONTROL_DEADLINE_S = 60.0


class PoolClient:
    """`Generate` through the pool.

    Small and picklable, because it holds the pool's handle alone and is sent by name.
    """

    def __init__(self, pool: Any, config: EnginesConfig) -> None:
        self._pool, self._config = pool, config

    def __reduce__(self) -> tuple[Any, ...]:
        # By name, because Ray otherwise warns in every run of handles in the arguments of restartable actors.
        return _named_pool_client, (self._config,)

    async def __call__(self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, key: str) -> Generation:
        """Generate one response. If an engine dies or misses the deadline, the request is retried on another one.

        Raises:
            EngineUnavailable: no engine is left that could answer.
        """
        tokens = len(prompt_ids) + sampling.max_tokens
        while True:
            # The lease has a name before it is granted, so a client that is cancelled meanwhile can return it.
            lease, failed = uuid.uuid4().hex, False
            counts: dict[str, int] = {}
            try:
                engine = await self._lease(lease, key, tokens)
                generation = await self._generate(engine, prompt_ids, sampling, seed)
                counts = {
                    "requests": 1,
                    "prompt_tokens": len(prompt_ids),
                    "cached_tokens": generation.cached_tokens,
                    "response_tokens": len(generation.token_ids),
                }
                return generation
            except _EngineFailed:
                failed, counts = True, {"requests_moved": 1}
            finally:
                self._pool.release.remote(lease, failed=failed, counts=counts)

    async def _lease(self, lease: str, key: str, tokens: int) -> Any:
        try:
            return await asyncio.wait_for(self._pool.lease.remote(lease, key, tokens), _healing_s(self._config))
        except RayTaskError as error:
            raise plain(error) from None
        except (*DIED, TimeoutError):
            raise EngineUnavailable("the engine pool does not answer") from None

    async def _generate(self, engine: Any, prompt_ids: Sequence[int], sampling: Sampling, seed: int) -> Generation:
        deadline_s = self._config.generate_deadline_s
        call = engine.generate.remote(list(prompt_ids), sampling, seed, deadline_s)
        try:
            generation: Generation = await asyncio.wait_for(call, deadline_s + CONTROL_DEADLINE_S)
        except asyncio.CancelledError:
            ray.cancel(call)
            raise
        # An error of an engine arrives as a RayTaskError that is also of the class of its cause.
        except (*DIED, EngineUnavailable, TimeoutError) as error:
            raise _EngineFailed from error
        return generation


def _named_pool_client(config: EnginesConfig) -> PoolClient:
    return PoolClient(ray.get_actor(POOL_NAME), config)


class _EngineFailed(Exception):
    """A request failed because of its engine, so that another engine may answer it."""


@dataclass(frozen=True)
class Pool:
    """The driver's handle of the pool."""

    actor: Any
    config: EnginesConfig

    @property
    def client(self) -> PoolClient:
        return PoolClient(self.actor, self.config)

    def deploy(self, policy: Path, version: str) -> None:
        """Have all engines serve the policy of a folder, under a version label.

        Raises:
            EngineUnavailable: an engine died or missed the deadline and could not be replaced.
        """
        deadline_s = self.config.sync_deadline_s + 2 * _healing_s(self.config)
        answer_of(self.actor.deploy.remote(str(policy), version), deadline_s)

    def engines(self) -> list[Any]:
        """Return the handles of all replicas, for a trainer that will send weights to them. Replaces dead ones first.

        Raises:
            EngineUnavailable: a replica died and could not be replaced.
        """
        return list(answer_of(self.actor.engines.remote(), _healing_s(self.config)))

    def enter(self, round_number: int, stage: str) -> None:
        """Label the pool's reports with a round and a stage from now on. Does not wait."""
        self.actor.enter.remote(round_number, stage)

    def counts(self) -> Counter[str]:
        """Return the pool's counters since its start.

        `requests` were answered. `requests_moved` went from a failed engine to another one. `engine_restarts` counts
        replacements. In tokens there are `prompt_tokens`, of which the prefix caches held `cached_tokens`, and
        `response_tokens`.
        """
        return Counter(answer_of(self.actor.counts.remote(), CONTROL_DEADLINE_S))


def _healing_s(config: EnginesConfig) -> float:
    """Compute the deadline in seconds of a pool call that may wait for the replacement of a replica."""
    return config.stall_deadline_s + config.start_deadline_s + 2 * CONTROL_DEADLINE_S


def answer_of(reference: Any, timeout_s: float) -> Any:
    """Wait for an answer of the pool.

    Raises:
        RunFailed: raised by the pool itself; an EngineUnavailable if the pool died or missed the deadline.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError:
        dump_stacks()
        raise EngineUnavailable(f"the engine pool did not answer within {timeout_s:.0f} s") from None
    except RayTaskError as error:
        raise plain(error) from error
    except DIED as error:
        raise EngineUnavailable(f"the engine pool died: {failure(error)}") from error
