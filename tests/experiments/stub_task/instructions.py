"""A task of IF-Eval's shape for lm-evaluation-harness, without the hub. Loaded by the harness."""

from typing import Any

from datasets import Dataset

MOVES = ("up", "down", "left", "right")


def load(**_: Any) -> dict[str, Dataset]:
    """Of every move, to say it and not to say it."""
    told = {"Say": True, "Never say": False}
    prompts = [(f"{words} [{move}].", move, wanted) for words, wanted in told.items() for move in MOVES]
    return {"test": Dataset.from_list([dict(zip(("prompt", "move", "wanted"), row, strict=True)) for row in prompts])}


def score(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    return {"prompt_level_strict_acc": (f"[{doc['move']}]" in results[0]) == doc["wanted"]}
