"""Send weights from the trainer. Runs in every training rank; rank 0 is the sender.

A source can be iterated repeatedly. `metadata()` lists the tensors, and iteration yields (name, full tensor) in that
order. Iteration may be a collective (ZeRO-3 gathers), so every rank iterates and only rank 0 transmits.
"""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self

from torch.distributed import ProcessGroup
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from oel_ray.weights import gloo
from oel_ray.weights.plugin import GLOO, NCCL

_FEW = 8
"""Number of tensors whose checksums are sent in every sync."""


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """The rendezvous of the group; `world_size` counts the sender and all engine workers."""

    backend: ClassVar[str] = GLOO

    address: str
    port: int
    world_size: int
    timeout_s: float


class GlooSender(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """Send over gloo, for engines on CPUs."""

    init_info_cls = GlooTrainerInitInfo
    _group: ProcessGroup | None = None

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        sender = cls(client=client, source=source, is_sender=init_info.is_sender)
        if not sender.is_sender:
            return sender
        meeting = asdict(init_info)
        rank = meeting.pop("rank")
        # Overlap the two calls, because workers block until the sender joins and the sender until they do.
        with _alongside(client.init_weight_transfer_engine, {**meeting, "rank_offset": rank + 1}):
            sender._group = gloo.gloo_group(**meeting, rank=rank)
        return sender

    def send_weights(self) -> None:
        """Do one sync. Called on every training rank.

        Raises:
            whatever the client raises if an engine fails or misses its deadline. The engines that took part can then no
            longer serve.
        """
        if self.source is None:
            raise ValueError("a sender needs a weight source")
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        if self._group is None:
            raise RuntimeError("no weight-transfer group: the sender was shut down")
        specs = [gloo.TensorSpec(meta.name, meta.dtype, tuple(meta.shape)) for meta in self.source.metadata()]
        self.client.start_weight_update()
        with _alongside(self.client.update_weights, _update_info(specs)):
            gloo.send_stream(self._group, specs, self.source)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self._group = None


@dataclass
class NcclTrainerInitInfo(NCCLTrainerInitInfo):
    """vLLM's own info, under a name that selects our receivers."""

    backend: ClassVar[str] = NCCL


class NcclSender(NCCLTrainerWeightTransferEngine):
    """vLLM's own NCCL sender; the receiving side is ours (`receive.NcclReceiver`)."""

    init_info_cls = NcclTrainerInitInfo


class NamedTensors(WeightSource):
    """A `WeightSource` over anything that has `metadata()` rows of (name, dtype, shape) and yields (name, tensor).

    `checksums` holds those of the last pass: of a few tensors drawn anew in each pass, or of all.
    """

    def __init__(self, weights: Any, check: Literal["few", "all"] = "few") -> None:
        self._weights, self._check = weights, check
        self.checksums: dict[str, int] = {}

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, dtype, tuple(shape)) for name, dtype, shape in self._weights.metadata()]

    def __iter__(self) -> Any:
        names = [meta.name for meta in self.metadata()]
        checked = set(names if self._check == "all" else random.Random().sample(names, min(_FEW, len(names))))
        self.checksums.clear()
        for name, tensor in self._weights:
            if name in checked:
                self.checksums[name] = gloo.checksum(tensor)
            yield name, tensor


def _update_info(specs: list[gloo.TensorSpec]) -> dict[str, Any]:
    return {
        "names": [spec.name for spec in specs],
        "dtype_names": [str(spec.dtype).removeprefix("torch.") for spec in specs],
        "shapes": [list(spec.shape) for spec in specs],
    }


@contextmanager
def _alongside(call: Callable[[dict[str, Any]], None], info: dict[str, Any]) -> Iterator[None]:
    """Run `call(info)`, the engines' side of a collective, in parallel with the body, which is our side.

    Raises:
        the engines' error if both sides failed, because ours is only its consequence.
    """
    side = ThreadPoolExecutor(1, thread_name_prefix="weight-sync")
    try:
        theirs = side.submit(call, info)
        try:
            yield
        except RuntimeError:
            if theirs.done():
                theirs.result()
            raise
        theirs.result()
    finally:
        side.shutdown(wait=False)  # the engines may block until their own deadline
