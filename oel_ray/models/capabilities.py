"""Tell whether a model supports packed samples and cached texts. Runs in the driver and in the training ranks."""

from typing import Any, Literal

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from oel_ray.errors import UserError

_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")


def has_fixed_rotations(model: Any) -> bool:
    """Tell whether the model accepts `position_ids`, and its rotary embedding does not depend on the length."""
    config = model.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = [rope for rope in ropes.values() if isinstance(rope, dict)] or [ropes]  # one for every kind of layer
    fixed = all(kind.get("rope_type") in _FIXED_ROTATIONS for kind in kinds)
    return fixed and not getattr(config, "alibi", False)


def can_pack(model: Any) -> bool:
    """Tell whether the model reads samples packed into one row as it reads each alone.

    Packing needs a model that accepts `position_ids`, whose rotary embedding does not depend on the sequence length.
    Its layers must use full or sliding-window attention. Chunks counted from the start of the row, or a recurrent
    state, would mix samples.
    """
    return (
        has_fixed_rotations(model)
        and not model._is_stateful
        and not getattr(model.config.get_text_config(), "attention_chunk_size", None)
        and _has_only_layers(model, DynamicLayer, DynamicSlidingWindowLayer)
    )


def _has_only_layers(model: Any, *kinds: type) -> bool:
    """Whether every layer of the model keeps keys and values, and in one of these ways."""
    config = model.config.get_text_config()
    layers = DynamicCache(config=config).layers
    return len(layers) == config.num_hidden_layers and all(type(layer) in kinds for layer in layers)


def reads_packed(model: Any, packing: Literal["auto", "always", "never"]) -> bool:
    """Tell whether the student's samples are packed into one row (`consolidate.packing`).

    Raises:
        UserError: packing is required, and the model does not support it.
    """
    if packing == "always" and not can_pack(model):
        raise UserError(
            f"consolidate.packing=always: {type(model).__name__} cannot keep samples apart that stand in one row: set "
            "consolidate.packing=auto"
        )
    flash = "flash" in model.config._attn_implementation
    return packing == "always" or (packing == "auto" and flash and can_pack(model))


_PAIRWISE_MASKS = ("eager", "sdpa")


def can_keep_texts(model: Any) -> bool:
    """Tell whether samples can be packed into one row after a cached text. Other teachers re-encode the text every
    time.

    This needs full attention in every layer, because a window would count the other samples of the row. The attention
    has to accept a mask over pairs of positions. The model has to accept `position_ids`, with a rotary embedding that
    does not depend on the length.
    """
    told = model.config._attn_implementation in _PAIRWISE_MASKS
    return told and has_fixed_rotations(model) and _has_only_layers(model, DynamicLayer)
