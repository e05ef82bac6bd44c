"""What a model's architecture allows: packed samples, kept texts. Runs in the driver and in the training ranks."""

from typing import Any, Literal

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from oel_ray.errors import UserError

_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")


def has_fixed_rotations(model: Any) -> bool:
    """Whether the model is told its positions, and turns keys by the same angle however long the prompt is."""
    config = model.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = [rope for rope in ropes.values() if isinstance(rope, dict)] or [ropes]  # one for every kind of layer
    fixed = all(kind.get("rope_type") in _FIXED_ROTATIONS for kind in kinds)
    return fixed and not getattr(config, "alibi", False)


def can_pack(model: Any) -> bool:
    """Whether the model reads samples that stand in one row as it reads each alone.

    It takes positions that are told, and layers that look back at a sample's own tokens: all of them or a window, no
    chunks that are counted from the start of the row, and no state that is carried on from token to token.
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
    """Whether the student's samples are one row (`consolidate.packing`).

    Raises:
        UserError: they are to be packed in any case, and the model cannot read them so.
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
    """Whether samples can be packed into one row behind a kept text. A teacher that cannot reads all of it every time.

    It takes full attention in every layer, since a window would count the other samples of the row; an attention
    that is told for each pair of positions whether one sees the other; and positions that are told as well and turn
    keys by the same angle however long the prompt is.
    """
    told = model.config._attn_implementation in _PAIRWISE_MASKS
    return told and has_fixed_rotations(model) and _has_only_layers(model, DynamicLayer)
