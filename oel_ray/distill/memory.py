"""Account for the memory of a training rank. The driver predicts it; a rank reports it when memory runs out."""

from pathlib import Path
from typing import Any, NamedTuple

from oel_ray.config.schema import ConsolidateConfig, LoraConfig


class ModelSize(NamedTuple):
    """Numbers that determine a model's memory."""

    parameters: int
    values_per_token: int
    """Numbers that a key/value cache stores per token."""
    own: int
    """Parameters that the student does not share with its teacher."""
    trained: int
    teacher: int


def rank_memory(config: ConsolidateConfig, own: int, trained: int, ranks: int) -> dict[str, float]:
    """Compute the bytes that a rank's student always takes, by part.

    `own` counts parameters that are not the teacher's, `trained` those that are trained.
    """
    size = _bytes(config.precision)
    states = 8 if (size == 4 and config.zero_stage == 0) else 12  # float32 parameters are their own masters
    where = " (on the host)" if config.offload_optimizer else ""
    return {
        "parameters": own * size / (ranks if config.zero_stage == 3 else 1),
        "gradients": trained * 4 / (ranks if config.zero_stage >= 2 else 1),
        f"masters and optimizer{where}": trained * states / (ranks if config.zero_stage >= 1 or size == 2 else 1),
    }


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def model_size(folder: Path, teacher: Path, lora: LoraConfig | None) -> ModelSize:
    """Count the parameters of a student from `folder` and of its teacher. Loads no weights."""
    from oel_ray.distill.lora import layers_to_adapt
    from oel_ray.models.load import model_without_weights

    model = model_without_weights(folder)
    text, numel = model.config.get_text_config(), _numel(model)
    heads = getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    values = 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * width
    if not lora:
        return ModelSize(numel, values, own=numel, trained=numel, teacher=_numel(model_without_weights(teacher)))
    adapters = sum(lora.rank * sum(model.get_submodule(name).weight.shape) for name in layers_to_adapt(model, lora))
    own = adapters + (numel if teacher != folder else 0)
    return ModelSize(numel, values, own=own, trained=adapters, teacher=_numel(model_without_weights(teacher)))


def _numel(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
