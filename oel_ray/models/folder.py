"""Read a Hugging Face checkpoint folder. vLLM workers and training ranks; imports neither Ray nor vLLM."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

Shapes = dict[str, tuple[int, ...]]

_DERIVED = ".rotary_emb.inv_freq"
"""Buffers in old folders, which nobody reads because they follow from the configuration."""

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def checkpoint_shapes(folder: str | Path) -> Shapes:
    """Read names and shapes of all weights of an HF checkpoint folder from the safetensors headers."""
    return {name: tuple(file.get_slice(name).get_shape()) for _, file, name in _weights(folder)}


def checkpoint_tensors(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over all weights of an HF checkpoint folder."""
    for _, file, name in _weights(folder):
        yield name, file.get_tensor(name)


def checkpoint_tensor(path: Path, name: str) -> torch.Tensor:
    """Read one weight from a file."""
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def wider_tensors(folder: str | Path, dtype: torch.dtype) -> dict[str, Path]:
    """Find the weights of an HF checkpoint folder that are more precise than `dtype`, and their files."""
    stored = {
        name: (path, _FLOATS.get(file.get_slice(name).get_dtype(), dtype)) for path, file, name in _weights(folder)
    }
    return {name: path for name, (path, kind) in stored.items() if torch.promote_types(kind, dtype) != dtype}


def _weights(folder: str | Path) -> Iterator[tuple[Path, Any, str]]:
    """Iterate over the weights: their file, open and as a path, and their name."""
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not name.endswith(_DERIVED):
                    yield path, file, name


def _weight_files(folder: str | Path) -> list[Path]:
    """List the files of the index, or else all, because some folders hold the same weights again in another form."""
    index = Path(folder, "model.safetensors.index.json")
    if index.exists():
        return [Path(folder, name) for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return sorted(Path(folder).glob("*.safetensors"))
