"""Write a policy's folder. Runs in rank 0 of the training group."""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")


class WeightSource(Protocol):
    """Weights to be written: `metadata` lists names, dtypes and shapes; iteration yields one tensor at a time."""

    @property
    def dtype(self) -> torch.dtype: ...
    def metadata(self) -> Sequence[tuple[str, torch.dtype, tuple[int, ...]]]: ...
    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


def export_policy(
    weights: WeightSource, source_folder: Path, target_folder: Path, *, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write an ordinary Hugging Face folder: these weights, and everything else as it is in `source_folder`.

    Collective: all ranks take part, rank 0 writes, and none returns before the folder is complete.
    """
    shards = split_torch_state_dict_into_shards(
        {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape in weights.metadata()},
        max_shard_size=max_shard_bytes,
    )
    writes = not dist.is_initialized() or dist.get_rank() == 0
    if writes:
        _copy_companions(source_folder, target_folder, weights.dtype)
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (target_folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    contents: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in weights:
        if not writes:
            continue
        file = shards.tensor_to_filename[name]
        there = tensor.detach().to("cpu").contiguous()
        is_alias = any(there.data_ptr() == other.data_ptr() for other in contents[file].values())
        contents[file][name] = there.clone() if is_alias else there  # a file holds no tensor twice
        if len(contents[file]) == len(shards.filename_to_tensors[file]):
            save_file(contents.pop(file), target_folder / file, metadata={"format": "pt"})
    if dist.is_initialized():
        dist.barrier()


def _copy_companions(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy tokenizer, chat template, generation config and configuration; set the configured dtype to ours."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*_WEIGHT_FILES, ".*"), dirs_exist_ok=True)
    path = target / "config.json"
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)  # the older name of the same field
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
