"""Add low-rank adapters to a student that shares its teacher's weights. Training workers (Ray Train group); needs no
Ray itself.

A layer with an adapter computes x W' + alpha / rank * x A' B'. W is the teacher's own. A is random and B zero at first,
so student and teacher start as the same function.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from oel_ray.config.schema import LoraConfig
from oel_ray.errors import UserError

ADAPTERS_FILE = "adapters.safetensors"


def sharing_weights(model: Any) -> Any:
    """Copy the model around the same parameters and buffers. Modules added to one copy later are not in the other."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def add_adapters(model: Any, config: LoraConfig, seed: int) -> None:
    """Add float32 adapters to the model, the same for the same seed, and freeze all other parameters.

    There is no dropout, because the student must be the policy that wrote the responses.

    Raises:
        UserError: the model has no such layers.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    layers = layers_to_adapt(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=layers), model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft uses the dtype of the frozen weight; the masters are copied from these
            parameter.data = parameter.data.float()


def load_adapters(model: Any, folder: Path) -> None:
    """Load the values of the model's adapters that `gather.save_adapters` wrote."""
    values = load_file(folder / ADAPTERS_FILE)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = values[name]


def layers_to_adapt(model: Any, config: LoraConfig) -> list[str]:
    """List the full names of the linear layers that get an adapter. The output head never gets one.

    Raises:
        UserError: the configuration names a layer that is not there.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    if config.target_modules == "all-linear":
        return linear
    for wanted in config.target_modules:
        if not any(_is_named(name, wanted) for name in linear):
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f"consolidate.lora.target_modules: {type(model).__name__} has no linear layer '{wanted}' before its "
                f"output head: choose from {', '.join(kinds)}, or write all-linear"
            )
    return [name for name in linear if any(_is_named(name, wanted) for wanted in config.target_modules)]


def _is_named(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")
