"""Gather the student's weights from DeepSpeed, for the engines and for an ordinary Hugging Face folder.

Training workers (Ray Train group); needs no Ray itself. Both paths read the float32 masters, if there are any, and
round them once with the same conversion. So an engine that received the weights equals one that loads the folder.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from torch import Tensor

from oel_ray.buckets import buckets
from oel_ray.distill.lora import ADAPTERS_FILE
from oel_ray.errors import UserError
from oel_ray.models.folder import checkpoint_shapes, checkpoint_tensor, wider_tensors

WeightMeta = tuple[str, torch.dtype, torch.Size]


class FullWeights:
    """The whole weights under their checkpoint names. Shaped like vLLM's `WeightSource`, without importing it.

    `metadata()` and iteration agree in names, order, dtypes and shapes. Tied weights occur under each name that the
    checkpoint stores. Some folders store a tied head as well, and vLLM then builds a separate head from that copy.
    """

    def __init__(
        self, model: Any, dtype: torch.dtype, folder: Path | None = None, *, bucket_numel: int = 50_000_000
    ) -> None:
        """`model`: the transformers model inside the `Distiller`, before or after DeepSpeed got hold of it.

        `folder`: the checkpoint that it was loaded from. Without it tied weights occur once, as `save_pretrained` would
        write them. Under ZeRO-3 parameters are gathered in buckets of up to `bucket_numel` elements; larger ones alone.
        """
        self.model = model
        self.dtype = dtype
        self.bucket_numel = bucket_numel
        self._stored = set(checkpoint_shapes(folder)) if folder else set()

    def metadata(self) -> list[WeightMeta]:
        """List (name, dtype, full shape) of every tensor. Gathers nothing; any rank may call it alone."""
        return [(name, self._dtype_of(tensor), _shape(tensor)) for name, tensor in self._tensors().items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over (name, tensor) from the start, on every rank.

        Collective if masters or parameters are partitioned (ZeRO-3): every rank then has to iterate to the end. A
        tensor may share memory with the model, so use it before the next optimizer step.
        """
        # Count by full shape, because a partitioned parameter has no elements of its own.
        for bucket in buckets(self._tensors().items(), lambda item: _shape(item[1]).numel(), self.bucket_numel):
            yield from self._whole(dict(bucket))

    def _tensors(self) -> dict[str, Tensor]:
        tied_away = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        unsaved = set(self.model._keys_to_ignore_on_save or ())
        first_names: dict[int, str] = {}
        state: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        for name in sorted(state, key=lambda name: name in tied_away):  # stable: canonical names come first
            first_names.setdefault(id(state[name]), name)
        names = (set(first_names.values()) - unsaved) | self._stored
        return {name: tensor for name, tensor in state.items() if name in names}

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if tensor.is_floating_point() else tensor.dtype

    @torch.no_grad()
    def _whole(self, bucket: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Gather the bucket's tensors, whole and in their wire dtype."""
        whole: dict[str, Tensor] = {}
        for name, tensor in bucket.items():
            # If the wire dtype is the parameter's own, the parameter already is its master, rounded.
            if tensor.requires_grad and tensor.dtype != self.dtype:
                master = safe_get_full_fp32_param(tensor)
                if master is not None:
                    whole[name] = master.detach().to(self.dtype).view(_shape(tensor))
        rest = {name: tensor for name, tensor in bucket.items() if name not in whole}
        partitioned = [*{tensor.ds_id: tensor for tensor in rest.values() if hasattr(tensor, "ds_id")}.values()]
        with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
            for name, tensor in rest.items():
                # Copy, because a gathered parameter loses its memory at the end of the context.
                whole[name] = tensor.detach().to(self._dtype_of(tensor), copy=hasattr(tensor, "ds_id"))
        return [(name, whole[name]) for name in bucket]


class MergedWeights(FullWeights):
    """The whole weights of a student with adapters (`lora`), merged, under the checkpoint's names.

    A weight and its adapter are added in float32 and rounded once. The frozen part comes from the checkpoint's folder
    if that is more precise than the student. Rounding it twice would change weights that were never trained.
    """

    def __init__(self, model: Any, dtype: torch.dtype, folder: Path) -> None:
        """`folder`: the checkpoint that the student was loaded from."""
        super().__init__(model, dtype, folder)
        self._folder = folder
        self._adapted = {f"{name}.weight": layer for name, layer in model.named_modules() if _has_adapter(layer)}

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate from the start, one merged tensor at a time.

        Collective to the end, because masters are partitioned.
        """
        tensors = self._tensors()
        files = wider_tensors(self._folder, next(tensors[name].dtype for name in self._adapted))
        for name, tensor in tensors.items():
            frozen = tensor.detach()
            if name in files:
                frozen = checkpoint_tensor(files[name], name).to(tensor.device)
            if name in self._adapted:
                frozen = frozen.float() + _product(self._adapted[name])
            yield name, frozen.to(self._dtype_of(tensor))

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, tensor in super()._tensors().items():
            layer, _, own = name.rpartition(".base_layer.")
            if layer:
                tensors[f"{layer}.{own}"] = tensor
            elif not tensor.requires_grad:  # else it is an adapter's
                tensors[name] = tensor
        return tensors


def weights_of(student: Any, dtype: torch.dtype, folder: Path) -> FullWeights:
    """Return the weights of a student that was loaded from the folder, with adapters or without."""
    if any(_has_adapter(layer) for layer in student.modules()):
        return MergedWeights(student, dtype, folder)
    return FullWeights(student, dtype, folder)


def save_adapters(student: Any, folder: Path) -> None:
    """Write the float32 masters of a student's adapters (`lora.load_adapters`). Collective: rank 0 writes."""
    masters = {name: _master(p).cpu().contiguous() for name, p in student.named_parameters() if p.requires_grad}
    if dist.get_rank() == 0:
        folder.mkdir()
        save_file(masters, folder / ADAPTERS_FILE)
    dist.barrier()


def _has_adapter(layer: Any) -> bool:
    return hasattr(layer, "base_layer") and hasattr(layer, "lora_A")


def _product(layer: Any) -> Tensor:
    """Compute the product of a layer's adapter, which is added to its weight, in float32."""
    (name,) = layer.lora_A
    product: Tensor = _master(layer.lora_B[name].weight) @ _master(layer.lora_A[name].weight) * layer.scaling[name]
    return product.T if layer.fan_in_fan_out else product


def _master(parameter: Tensor) -> Tensor:
    master: Tensor | None = None if parameter.dtype == torch.float32 else safe_get_full_fp32_param(parameter)
    return parameter.detach().float() if master is None else master.view(parameter.shape)


def _shape(tensor: Tensor) -> torch.Size:
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def check_names(weights: FullWeights, folder: Path) -> None:
    """Make sure that the weights have the names of the checkpoint that they were loaded from.

    transformers renames and fuses the tensors of some models while it loads them, above all of mixtures of experts.
    Nobody could load a policy under those names, and the engines only know the checkpoint's.

    Raises:
        UserError: some names differ.
    """
    ours, theirs = {name for name, *_ in weights.metadata()}, set(checkpoint_shapes(folder))
    if differing := sorted(ours ^ theirs):
        name = type(weights.model).__name__
        where = "transformers" if differing[0] in ours else "the checkpoint"
        raise UserError(
            f"{name} cannot be trained: its tensors have other names in transformers than in the checkpoint "
            f"({len(differing)} differ; {differing[0]} is one of {where} alone)"
        )
