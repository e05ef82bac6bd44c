"""Puts a trained micro model into the package, with its model card. Run as a script; see README.md."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

PACKAGE = Path(__file__).resolve().parents[2] / "oel_ray" / "models" / "micro"
FIGURES, CARD = "abilities.json", "README.md"
TEMPLATE = Path(__file__).with_name("card.md")


def publish(
    folder: Annotated[Path, typer.Argument(help="Folder of the trained model.")],
    figures: Annotated[Path, typer.Argument(help="What `evaluate --out` wrote about it.")],
) -> None:
    """Write weights (bfloat16), tokenizer and model card to oel_ray/models/micro."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(PACKAGE)
    AutoTokenizer.from_pretrained(folder).save_pretrained(PACKAGE)
    (PACKAGE / FIGURES).write_bytes(figures.read_bytes())
    (PACKAGE / CARD).write_text(card(json.loads(figures.read_text()), sum(p.numel() for p in model.parameters())))


def card(figures: dict[str, Any], parameters: int) -> str:
    """The model card with the measured figures in it."""
    rows = ["| | " + " | ".join(figures) + " |", "|---|" + "---|" * len(figures)]
    rows += [
        f"| {name} | " + " | ".join(_written(name, place[name]) for place in figures.values()) + " |"
        for name in next(iter(figures.values()))
    ]
    text = TEMPLATE.read_text().replace("{{abilities}}", "\n".join(rows))
    return text.replace("{{parameters}}", f"{parameters / 1e6:.2f} million")


def _written(name: str, value: float) -> str:
    return f"{value:.1f}" if name.startswith("tokens") else f"{100 * value:.0f} %"


if __name__ == "__main__":
    typer.run(publish)
