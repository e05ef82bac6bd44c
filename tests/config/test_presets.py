"""The presets against the paper's values, written down here a second time from the paper and the official code."""

from typing import Any

import pytest

from oel_ray.config.load import load_config, preset_names
from oel_ray.config.schema import RunConfig

# model, thinking, environment, format, previous knowledge shown, n, L_max, steps, learning rate
EXPERIMENTS: dict[str, tuple[Any, ...]] = {
    "frozenlake-qwen3-1.7b": ("Qwen/Qwen3-1.7B", True, "FrozenLake-v0", "unstructured", False, 15, 2048, 20, 5e-6),
    "frozenlake-qwen3-4b": ("Qwen/Qwen3-4B", True, "FrozenLake-v0", "structured", True, 25, 8192, 20, 1e-6),
    "frozenlake-qwen3-8b": ("Qwen/Qwen3-8B", True, "FrozenLake-v0", "structured", True, 50, 8192, 100, 1e-6),
    "sokoban-qwen3-4b-instruct": (
        "Qwen/Qwen3-4B-Instruct-2507", False, "Sokoban-v0", "structured", True, 50, 8192, 100, 1e-6,
    ),
}  # fmt: skip
GAMES = {"frozenlake": {"size": 3, "num_holes": 2, "randomize_start_goal": False}}
GAMES["sokoban"] = {"dim_room": [6, 6], "num_boxes": 1, "max_turns": 30}  # type: ignore[dict-item]

# temperature, top_p, top_k (0: off), new tokens; None stands for L_max
SAMPLING: dict[str, tuple[float, float, int, int | None]] = {
    "collect.sampling": (0.7, 1.0, 0, 1024),
    "extract.sampling": (0.7, 0.8, 20, None),
    "consolidate.sampling": (0.7, 1.0, 0, 1024),
    "evaluate.sampling": (0.7, 0.8, 20, 1024),
}


def value(config: RunConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("switches", [[], ["paper=true"]])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_presets_of_the_paper_hold_its_published_values(name: str, switches: list[str]) -> None:
    config = load_config(name, switches)
    extract, consolidate, evaluate = config.extract, config.consolidate, config.evaluate
    assert (
        config.model, config.thinking, config.env.id, extract.format, extract.show_previous,
        config.collect.extraction_games, extract.max_tokens, consolidate.steps, consolidate.learning_rate,
    ) == EXPERIMENTS[name]  # fmt: skip
    assert (extract.seeds, consolidate.games_per_step) == (10, 64)
    assert (consolidate.weight_decay, consolidate.grad_clip, consolidate.warmup_steps) == (0.01, 1.0, 0)
    assert consolidate.temperature == 0.7
    assert (evaluate.maps, evaluate.seeds) == (128, 10)
    for key, (temperature, top_p, top_k, new) in SAMPLING.items():
        sampling = value(config, key)
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (temperature, top_p, top_k), key
        assert sampling.max_tokens == (new or extract.max_tokens), key


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_switch_paper_sets_what_the_official_code_does(name: str) -> None:
    clean, paper = load_config(name), load_config(name, ["paper=true"])
    game = name.partition("-")[0]
    assert (paper.env.params, paper.env.max_turns, paper.env.min_solution) == (GAMES[game], 5, 0)
    assert [config.env.split for config in (clean, paper)] == ["by_map", "paper"]
    assert [config.env.state_result for config in (clean, paper)] == [False, True]
    assert [config.env.show_actions for config in (clean, paper)] == [True, game == "frozenlake"]
    assert [config.consolidate.divergence for config in (clean, paper)] == ["full", "top_k"]
    assert [config.consolidate.loss_mean for config in (clean, paper)] == ["response", "token"]
    assert [config.consolidate.batching for config in (clean, paper)] == ["shuffled", "by_game"]
    assert paper.consolidate.top_k == 256
    assert clean.collect.sampling_for("extraction") == clean.collect.sampling
    played = paper.collect.sampling_for("extraction")
    assert (played.temperature, played.top_p, played.top_k, played.max_tokens) == (0.7, 0.8, 20, 1024)
    assert paper.collect.sampling_for("consolidation") == clean.collect.sampling


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_resolves(name: str) -> None:
    assert load_config(name) == load_config(name, ["rounds=" + str(load_config(name).rounds)])
