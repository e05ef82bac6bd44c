"""Check the model that a run starts with, and its teacher. Runs in the driver."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from oel_ray.config.schema import RunConfig
from oel_ray.errors import UserError, one_line
from oel_ray.models.resolve import resolve_model
from oel_ray.text.chat import ChatFormat


class Model(NamedTuple):
    """The properties of a policy that are known without its weights."""

    folder: Path
    chat: ChatFormat
    context: int | None
    """Tokens of the model's context; None if its configuration has no such value."""
    words: int
    """Size of its output vocabulary."""


def check_model(config: RunConfig, note: Callable[[str], None]) -> Model:
    """Check the model, and return its folder, chat format and context.

    Raises:
        UserError: the model cannot be found, is incomplete or no chat model, or contradicts the setting `thinking`.
    """
    folder = resolve_model(config.model, note)
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # errors are reported here, in one line
    try:
        model = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - any content of the file can raise anything
        raise UserError(
            f"{folder}/config.json cannot be used: {one_line(error, 0)}: give a model that transformers knows by itself"
        ) from None
    _check_architecture(folder, model)
    try:
        chat = ChatFormat.from_pretrained(folder, thinking=config.thinking)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - tokenizers and templates can raise anything
        raise UserError(
            f"the tokenizer in {folder} cannot be used: {one_line(error, 0)}: "
            "copy its files there from the original model"
        ) from None
    chat.check_thinking()
    text_model = model.get_text_config()
    return Model(folder, chat, _context(text_model), text_model.vocab_size)


def check_teacher(config: RunConfig, model: Model, note: Callable[[str], None]) -> Model:
    """Check the teacher, which is the model itself unless another is configured, and return it.

    Raises:
        UserError: the teacher cannot be used, or its tokens differ from the model's.
    """
    if config.consolidate.teacher is None:
        return model
    teacher = check_model(config.model_copy(update={"model": config.consolidate.teacher}), note)
    ours, theirs = model.chat.tokenizer, teacher.chat.tokenizer
    framed = [(chat.before_ids, chat.after_ids) for chat in (model.chat, teacher.chat)]
    if ours.get_vocab() != theirs.get_vocab() or framed[0] != framed[1] or model.words != teacher.words:
        raise UserError(
            f"consolidate.teacher: {teacher.folder} has another tokenizer, chat template or size of vocabulary than "
            f"the model {model.folder}: teacher and student must read and write the same tokens"
        )
    return teacher


def _check_architecture(folder: Path, model: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    names = model.architectures or [KNOWN.get(model.model_type, "")]
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) or name == KNOWN.get(model.model_type) for name in names)
    if model.is_encoder_decoder or model.model_type not in KNOWN or not causal:
        kind = ", ".join(filter(None, names)) or model.model_type
        raise UserError(f"the model {folder} ({kind}) is no decoder-only language model: give a ...ForCausalLM model")


def _context(model: Any) -> int | None:
    """Compute the longest text that vLLM serves with this configuration of a text model."""
    longest: int | None = getattr(model, "max_position_embeddings", None)
    rope = getattr(model, "rope_parameters", None) or {}
    if longest and rope.get("rope_type") in ("linear", "dynamic"):
        longest = int(longest * rope.get("factor", 1))  # other kinds of scaling are included already
    return longest
