"""Sync weights from the training ranks to all engines. Runs in every rank; only rank 0 imports vLLM and transmits.

One `WeightSync` lives as long as the training group. After a failed sync its engines cannot serve, so its error must
end the training attempt.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from oel_ray.cluster.actors import plain
from oel_ray.config.schema import EnginesConfig
from oel_ray.errors import EngineUnavailable
from oel_ray.faults import fault_point


class EngineSyncClient:
    """vLLM's `VLLMWeightSyncClient` over our engine actors: every call reaches all engines and has a deadline.

    Raises (from every method):
        EngineUnavailable: an engine missed the deadline, or failed; the message holds the engine's own.
    """

    def __init__(self, engines: Sequence[Any], workers_per_engine: int, deadline_s: float) -> None:
        self._engines = engines
        self._workers_per_engine = workers_per_engine
        self._deadline_s = deadline_s
        self.version = ""
        self.checksums: Mapping[str, int] = {}
        """Checksums of tensors of the current sync, which the engines compare with their own."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        # The engines are independent replicas; each gets its own ranks after the sender's rank 0.
        offsets = range(1, 1 + len(self._engines) * self._workers_per_engine, self._workers_per_engine)
        self._get(
            [
                engine.init_weight_transfer_engine.remote({**init_info, "rank_offset": offset})
                for engine, offset in zip(self._engines, offsets, strict=True)
            ]
        )

    def start_weight_update(self) -> None:
        self._get([engine.start_weight_update.remote() for engine in self._engines])

    def update_weights(self, update_info: dict[str, Any]) -> None:
        fault_point(f"{self.version}:half-sent")
        self._get([engine.update_weights.remote(update_info) for engine in self._engines])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        # vLLM's own NCCL sender passes no version, so use the one that was set for this sync.
        version = weight_version or self.version
        if self.checksums:
            self.update_weights({"checksums": dict(self.checksums)})
        self._get([engine.finish_weight_update.remote(version) for engine in self._engines])

    def _get(self, references: list[Any]) -> None:
        waiting, until = references, time.monotonic() + self._deadline_s
        while waiting:  # report the first failure; other engines may be waiting for it in a collective
            ready, waiting = ray.wait(waiting, timeout=max(until - time.monotonic(), 0))
            late = [str(number) for number, reference in enumerate(references) if reference in waiting]
            if not ready:
                raise EngineUnavailable(
                    f"a weight sync took more than engines.sync_deadline_s={self._deadline_s:g} on engines "
                    f"{', '.join(late)}"
                )
            for reference in ready:
                try:
                    ray.get(reference)  # ready
                except RayError as error:
                    number = references.index(reference)
                    raise EngineUnavailable(f"engine {number} failed a weight sync: {plain(error)}") from error


class WeightSync:
    """The sender of all syncs of one training group."""

    def __init__(self, engines: Sequence[Any], weights: Any, config: EnginesConfig, *, rank: int, on_gpu: bool) -> None:
        """Join the group of sender and engines, on rank 0 alone; other ranks only help to gather weights.

        `weights` are full tensors under their checkpoint names, as `send.NamedTensors` takes them.
        """
        self._weights = weights
        self.nbytes = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in weights.metadata())
        """Bytes that every sync sends."""
        self._sender: Any = None
        if rank != 0:
            return
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.utils.network_utils import get_open_port

        from oel_ray.weights.plugin import register
        from oel_ray.weights.send import GlooTrainerInitInfo, NamedTensors, NcclTrainerInitInfo

        register()
        source = NamedTensors(weights, config.check_weights)
        self._client = EngineSyncClient(engines, config.tensor_parallel, config.sync_deadline_s)
        self._client.checksums = source.checksums
        address, port = ray.util.get_node_ip_address(), get_open_port()
        world_size = 1 + len(engines) * config.tensor_parallel
        info: Any = (
            NcclTrainerInitInfo(address, port, world_size, rank=0)
            if on_gpu
            else GlooTrainerInitInfo(address, port, world_size, config.sync_deadline_s, rank=0)
        )
        self._sender = WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=source)

    def send(self, version: str) -> None:
        """Send the current weights to all engines, labelled `version`. Called on every rank."""
        if self._sender is None:
            for _ in self._weights:
                pass
            return
        self._client.version = version
        self._sender.send_weights()
