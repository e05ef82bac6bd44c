"""Trainer side of the weight transfer. Runs in every training rank; rank 0 is the sender.

A source is re-iterable: `metadata()` says what will come, iterating yields (name, full tensor) in that order. Iterating
may be a collective (ZeRO-3 gathers), so every rank iterates and only rank 0 transmits.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from torch.distributed import ProcessGroup
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from oel_ray.engines import transport
from oel_ray.engines.plugin import GLOO, NCCL


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """Where the group meets; `world_size` counts the sender and all engine workers."""

    backend: ClassVar[str] = GLOO

    address: str
    port: int
    world_size: int
    timeout_s: float


class GlooSender(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """Sends over gloo: for engines on CPUs."""

    init_info_cls = GlooTrainerInitInfo
    _group: ProcessGroup | None = None

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        sender = cls(client=client, source=source, is_sender=init_info.is_sender)
        if not sender.is_sender:
            return sender
        meeting: dict[str, Any] = {
            "address": init_info.address,
            "port": init_info.port,
            "world_size": init_info.world_size,
        }
        worker_info = {**meeting, "rank_offset": 1, "timeout_s": init_info.timeout_s}
        # Workers block until the sender joins and the other way round, so the two must overlap.
        with _side_thread() as side:
            joined = side.submit(client.init_weight_transfer_engine, worker_info)
            sender._group = transport.gloo_group(**meeting, rank=0, timeout_s=init_info.timeout_s)
            joined.result()
        return sender

    def send_weights(self) -> None:
        """One sync, called on every training rank.

        Raises:
            whatever the client raises when an engine fails or misses its deadline; the engines that took part
            cannot serve any more then.
        """
        if self.source is None:
            raise ValueError("a sender needs a weight source")
        if not self.is_sender or self._group is None:
            for _ in self.source:
                pass
            return
        specs = [transport.TensorSpec(meta.name, meta.dtype, tuple(meta.shape)) for meta in self.source.metadata()]
        self.client.start_weight_update()
        with _side_thread() as side:
            received = side.submit(self.client.update_weights, _update_info(specs))
            transport.send_stream(self._group, specs, self.source)
            received.result()
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self._group = None


@dataclass
class NcclTrainerInitInfo(NCCLTrainerInitInfo):
    """vLLM's own, dispatched to our receivers by another name."""

    backend: ClassVar[str] = NCCL


class NcclSender(NCCLTrainerWeightTransferEngine):
    """vLLM's own NCCL sender; the receiving side is ours (`receive.NcclReceiver`)."""

    init_info_cls = NcclTrainerInitInfo


class NamedTensors(WeightSource):
    """A `WeightSource` over anything that has `metadata()` rows of (name, dtype, shape) and yields (name, tensor)."""

    def __init__(self, weights: Any) -> None:
        self._weights = weights

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, dtype, tuple(shape)) for name, dtype, shape in self._weights.metadata()]

    def __iter__(self) -> Any:
        return iter(self._weights)


def _update_info(specs: list[transport.TensorSpec]) -> dict[str, Any]:
    rows = [asdict(spec) for spec in specs]
    return {
        "names": [row["name"] for row in rows],
        "dtype_names": [str(row["dtype"]).removeprefix("torch.") for row in rows],
        "shapes": [list(row["shape"]) for row in rows],
    }


class _side_thread(ThreadPoolExecutor):  # noqa: N801
    """One thread that an error does not wait for: its peer may be blocked until a deadline of its own."""

    def __init__(self) -> None:
        super().__init__(max_workers=1, thread_name_prefix="weight-sync")

    def __exit__(self, *_: object) -> None:
        self.shutdown(wait=False)
