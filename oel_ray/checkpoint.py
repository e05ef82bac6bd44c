"""What lies in a Hugging Face checkpoint folder. vLLM workers and training ranks; imports neither Ray nor vLLM."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

Shapes = dict[str, tuple[int, ...]]

TIED_HEAD = "lm_head.weight"
"""Some folders of models with a tied head hold it all the same, and some do not."""

_DERIVED = ".rotary_emb.inv_freq"
"""Old folders hold these buffers. They follow from the configuration, and nobody reads them."""


def checkpoint_shapes(folder: str | Path) -> Shapes:
    """Names and shapes of all weights of an HF checkpoint folder, read from the safetensors headers."""
    shapes: Shapes = {}
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return {name: shape for name, shape in shapes.items() if not name.endswith(_DERIVED)}


def checkpoint_tensors(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights of an HF checkpoint folder."""
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not name.endswith(_DERIVED):
                    yield name, file.get_tensor(name)


def _weight_files(folder: str | Path) -> list[Path]:
    """The files that the index names, if there is one: some folders hold the same weights again in another form."""
    index = Path(folder, "model.safetensors.index.json")
    if index.exists():
        return [Path(folder, name) for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return sorted(Path(folder).glob("*.safetensors"))
