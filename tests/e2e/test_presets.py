"""Every experiment of the paper from end to end, scaled down by overrides alone, with a tiny model of the same kind."""

import json
from pathlib import Path

import pytest

from oel_ray.config.load import load_config
from oel_ray.config.schema import RunConfig
from oel_ray.runs.layout import RoundFiles
from tests.e2e.test_run import oel
from tests.support.tiny_models import save_tiny_model

SCALED_DOWN = [
    "rounds=1",
    "collect.extraction_games=2",
    "collect.players=1",
    "collect.sampling.max_tokens=16",
    "collect.extraction_sampling.max_tokens=16",
    "extract.seeds=2",
    "extract.max_tokens=64",
    "extract.sampling.max_tokens=24",
    "consolidate.steps=2",
    "consolidate.games_per_step=2",
    "consolidate.workers=2",
    "consolidate.sampling.max_tokens=16",
    "evaluate.maps=3",
    "evaluate.seeds=1",
    "evaluate.sampling.max_tokens=16",
    "engines.count=1",
    "engines.device=cpu",
    "engines.max_model_len=4096",
]


@pytest.mark.slow
@pytest.mark.parametrize("switches", [[], ["paper=true"]], ids=["clean", "paper"])
@pytest.mark.parametrize(
    ("preset", "tied", "thinking"),
    [
        ("frozenlake-qwen3-1.7b", True, True),
        ("frozenlake-qwen3-4b", True, True),
        ("frozenlake-qwen3-4b", True, False),
        ("frozenlake-qwen3-8b", False, True),
        ("sokoban-qwen3-4b-instruct", True, False),
    ],
)
def test_every_preset_runs_from_end_to_end_and_passes_verify(
    preset: str, tied: bool, thinking: bool, switches: list[str], tmp_path: Path
) -> None:
    can_think = not preset.endswith("-instruct")
    model = save_tiny_model(tmp_path / "model", tied=tied, thinking=can_think, closes_thoughts=can_think and not tied)
    settings = [f"model={model}", f"thinking={str(thinking).lower()}", *switches, *SCALED_DOWN]
    folder = tmp_path / "run"
    finished = oel("run", preset, *settings, "--run-dir", str(folder))
    assert finished.returncode == 0, finished.stderr
    verified = oel("verify", str(folder), "--replay")
    assert verified.returncode == 0, verified.stdout
    assert untouched(load_config(preset, [*settings])) == untouched(load_config(preset, [*switches]))
    steps = [json.loads(line) for line in RoundFiles(folder / "rounds/001").consolidation_metrics.open()]
    assert [step["applied"] for step in steps] == [True, True]


def untouched(config: RunConfig) -> dict[str, object]:
    """What scaling down must leave as the preset has it."""
    extract, consolidate = config.extract, config.consolidate
    return {
        "env": config.env,
        "format": (extract.format, extract.show_previous),
        "batching": (consolidate.batching, consolidate.loss_mean, consolidate.divergence, consolidate.top_k),
        "training": (consolidate.zero_stage, consolidate.precision, consolidate.gradient_checkpointing),
    }
