"""Receive weights in the workers. Runs inside vLLM's Worker processes.

These checks, which vLLM's own transfer engines lack, make it safe to serve after a sync:

- every tensor of the checkpoint must have come, with its full shape, or the sync fails; vLLM only logs a missing
  tensor, and a half-sent fused layer keeps uninitialised memory;
- a tied output head that the CPU backend keeps in a packed form is packed again;
- tensors whose checksums the sender gives are compared with those that the model holds at the end.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed import ProcessGroup
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from oel_ray.models.folder import Shapes, checkpoint_shapes, checkpoint_tensors
from oel_ray.weights import gloo


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One update of a sync: tensors from the stream, or a `folder` that the worker reads, or the final `checksums`."""

    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    folder: str | None = None
    checksums: dict[str, int] = field(default_factory=dict)

    def specs(self) -> list[gloo.TensorSpec]:
        rows = zip(self.names, self.dtype_names, self.shapes, strict=True)
        return [gloo.TensorSpec(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in rows]


class CheckedReceiver(WeightTransferEngine[Any, UpdateInfo]):
    """The common part of our receivers: layerwise reload, loading from a folder, completeness, the tied head."""

    update_info_cls = UpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._received: Shapes = {}
        self._checksums: dict[str, int] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def start_weight_update(self) -> None:
        self._received, self._checksums = {}, {}
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if update_info.folder is not None:
            self._received |= checkpoint_shapes(update_info.folder)
            self.model.load_weights(checkpoint_tensors(update_info.folder))
            return
        if update_info.checksums:
            self._checksums = update_info.checksums
            return
        self.receive_stream(update_info)
        self._received |= {spec.name: spec.shape for spec in update_info.specs()}
        self._dtypes |= {spec.name: spec.dtype for spec in update_info.specs()}

    def receive_stream(self, update_info: UpdateInfo) -> None:
        raise NotImplementedError

    def finish_weight_update(self) -> None:
        self.check_complete()
        finalize_layerwise_reload(self.model, self.model_config)
        self.repack_tied_head()
        self.check_sums()

    def check_complete(self) -> None:
        """Compare the received tensors with the checkpoint that this engine was started from.

        Raises:
            RuntimeError: tensors are missing, unknown or of another shape; names the first ones.
        """
        expected, received = checkpoint_shapes(self.model_config.model), self._received
        if received != expected:
            missing = sorted(expected.keys() - received.keys())
            unknown = sorted(received.keys() - expected.keys())
            changed = sorted(n for n in expected.keys() & received.keys() if expected[n] != received[n])
            raise RuntimeError(
                f"incomplete weight sync: missing {missing[:3]} ({len(missing)}), "
                f"unknown {unknown[:3]} ({len(unknown)}), of another shape {changed[:3]} ({len(changed)})"
            )

    def check_sums(self) -> None:
        """Compare the model's tensors with the checksums of the sent ones.

        Fused, partitioned, packed and converted tensors are skipped, because the model holds them in another form.

        Raises:
            RuntimeError: a tensor differs; names it.
        """
        held = dict(self.model.named_parameters())
        for name in held.keys() & self._checksums.keys():
            shape = torch.Size(self._received[name])
            tensor = held[name][: shape[0]] if shape else held[name]  # vLLM may pad the vocabulary
            is_comparable = tensor.shape == shape and tensor.dtype == self._dtypes[name]
            if is_comparable and gloo.checksum(tensor) != self._checksums[name]:
                raise RuntimeError(f"the engine does not hold what was sent: {name} differs")

    def repack_tied_head(self) -> None:
        """Pack a tied head again from the embedding that it shares.

        On CPUs vLLM's first load packs the head into a separate buffer. A reload refreshes only layers that received
        weights, and a tied head receives none.
        """
        head = getattr(self.model, "lm_head", None)
        if head is None or self.device.type != "cpu" or not self.model_config.hf_config.tie_word_embeddings:
            return
        head.quant_method.process_weights_after_loading(head)


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """The rendezvous of the group. The worker's rank is `rank_offset` plus its rank inside the engine."""

    address: str
    port: int
    rank_offset: int
    world_size: int
    timeout_s: float


class GlooReceiver(CheckedReceiver):
    """Receive over gloo, for engines on CPUs."""

    init_info_cls = GlooInitInfo
    _group: ProcessGroup | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        rank = init_info.rank_offset + self.parallel_config.rank
        self._group = gloo.gloo_group(
            init_info.address, init_info.port, rank, init_info.world_size, init_info.timeout_s
        )

    def receive_stream(self, update_info: UpdateInfo) -> None:
        if self._group is None:
            raise RuntimeError("no weight-transfer group: init_transfer_engine comes first")
        for tensors in gloo.receive_stream(self._group, update_info.specs()):
            self.model.load_weights(tensors)

    def shutdown(self) -> None:
        self._group = None


class NcclReceiver(CheckedReceiver, NCCLWeightTransferEngine):
    """Receive over NCCL with vLLM's own transfer engine and our checks around it."""

    init_info_cls = NCCLWeightTransferEngine.init_info_cls
    update_info_cls = UpdateInfo

    def receive_stream(self, update_info: UpdateInfo) -> None:
        NCCLWeightTransferEngine.receive_weights(self, update_info)
