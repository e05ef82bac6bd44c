"""The whole loop with a tiny model of every family, with heads and chat templates of both kinds."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oel_ray.models.folder import checkpoint_shapes
from oel_ray.models.load import load_model
from oel_ray.records import EvaluationGame, KnowledgeText, read_jsonl
from oel_ray.runs.layout import RoundFiles
from tests.e2e.test_run import SMALL, oel
from tests.support.tiny_models import save_tiny_model

PLAIN, ON, OFF = "plain", "on", "off"
"""A chat template that knows no thinking, and one that does, with thinking switched on or off."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tied", "thinking"),
    [
        ("gemma3", False, ON),
        ("gemma3", True, OFF),
        ("gemma3", True, PLAIN),
        ("gemma2", True, ON),
        ("gemma2", True, OFF),
        ("gemma", True, ON),
        ("gemma", True, PLAIN),
        ("smollm3", True, ON),
        ("smollm3", False, OFF),
        ("llama", True, PLAIN),
        ("llama", False, ON),
        ("qwen3", True, ON),
        ("qwen3", False, OFF),
    ],
)
def test_a_round_changes_only_the_weights_in_a_policy_folder(
    family: str, tied: bool, thinking: str, tmp_path: Path
) -> None:
    closes = thinking == ON and not tied
    model = save_tiny_model(tmp_path / "model", family, tied=tied, thinking=thinking != PLAIN, closes_thoughts=closes)
    folder = tmp_path / "run"
    settings = [f"thinking={str(thinking == ON).lower()}", "extract.sampling.temperature=1"]
    finished = oel("run", "exact", f"model={model}", *SMALL, *settings, "--run-dir", str(folder))
    assert finished.returncode == 0, finished.stderr
    verified = oel("verify", str(folder), "--replay")
    assert verified.returncode == 0, verified.stdout

    files = RoundFiles(folder / "rounds/001")
    texts = [KnowledgeText.from_json(path.read_bytes()) for path in files.knowledge_files()]
    found = {step.status for text in texts for step in text.steps}
    steps = [json.loads(line) for line in files.consolidation_metrics.read_text().splitlines()]
    kl = [step["kl_per_token"] for step in steps]
    print(found, "KL per token:", kl)
    assert all(step["applied"] for step in steps)
    if thinking == ON and not closes:  # nobody ever says anything: the teacher knows no more than the student
        assert found == {"unclosed_thought"}
        assert not any(text.text for text in texts)
        assert kl == pytest.approx([0.0, 0.0], abs=1e-5)
    else:
        assert "added" in found
        assert ("unclosed_thought" in found) == closes
        assert min(kl) > 1e-4
    assert_same_kind_of_folder(model, files.policy)
    assert_wrote(model, RoundFiles(folder / "rounds/000").evaluation_games)
    assert_wrote(files.policy, files.evaluation_games)


@torch.no_grad()
def assert_wrote(policy: Path, games: Path) -> None:
    """Every word of a greedy player is the one that the trainer's model of the policy finds likeliest."""
    model = load_model(policy, torch.float32)
    for turn in (turn for game in read_jsonl(games, EvaluationGame) for turn in game.turns):
        logits = model(torch.tensor([[*turn.prompt_ids, *turn.response_ids]])).logits[0, len(turn.prompt_ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(turn.response_ids).unsqueeze(1)).squeeze(1)
        assert (logits.amax(1) - chosen).max() < 1e-3


def assert_same_kind_of_folder(source: Path, policy: Path) -> None:
    assert checkpoint_shapes(policy) == checkpoint_shapes(source)
    after, loading = AutoModelForCausalLM.from_pretrained(policy, dtype="auto", output_loading_info=True)
    assert not any(loading.values()), loading
    before = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    assert {name: p.dtype for name, p in after.named_parameters()} == {
        name: torch.float32 for name, _ in before.named_parameters()
    }
    assert after.config.to_dict() | {"_name_or_path": ""} == before.config.to_dict() | {"_name_or_path": ""}
    unchanged = [name for name, p in after.named_parameters() if torch.equal(p, before.get_parameter(name))]
    assert not unchanged
    old, new = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(policy)
    assert new.chat_template == old.chat_template
    assert new.get_vocab() == old.get_vocab()
