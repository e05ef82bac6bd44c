"""What a model's memory follows from, against models that are really there."""

from pathlib import Path

import pytest
import torch

from oel_ray.config.schema import LoraConfig
from oel_ray.distill.lora import add_adapters
from oel_ray.distill.memory import model_size
from oel_ray.models.load import load_model

MICRO = Path(__file__).parents[2] / "oel_ray" / "models" / "micro"


def test_the_predicted_sizes_of_model_and_cache_are_the_real_ones() -> None:
    model = load_model(MICRO, torch.float32)
    size = model_size(MICRO, MICRO, None)
    assert size.parameters == size.own == size.trained == size.teacher == model.num_parameters()
    cache = model(torch.ones(1, 3, dtype=torch.long)).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert size.values_per_token == kept // 3


@pytest.mark.parametrize("layers", ["all-linear", ("q_proj", "v_proj")])
def test_adapters_are_all_that_a_student_adds_to_its_teacher(layers: object) -> None:
    lora = LoraConfig(rank=4, target_modules=layers)
    model = load_model(MICRO, torch.float32)
    add_adapters(model, lora, 0)
    size = model_size(MICRO, MICRO, lora)
    assert size.own == size.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size.teacher == size.parameters


def test_a_student_with_adapters_shares_nothing_with_another_teacher(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((MICRO / "config.json").read_bytes())
    size = model_size(MICRO, tmp_path, LoraConfig(rank=4))
    assert size.own == size.parameters + size.trained and size.teacher == size.parameters
