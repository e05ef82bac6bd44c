"""Two rounds with output heads of every kind: after each sync the engines write what that policy would."""

import json
import shutil
from itertools import groupby
from pathlib import Path

import pytest
import torch

from oel_ray.models.folder import checkpoint_shapes
from oel_ray.models.load import load_model
from oel_ray.models.resolve import resolve_model
from oel_ray.records import EvaluationGame, Trajectory, read_jsonl
from oel_ray.runs.layout import RoundFiles
from tests.e2e.test_run import SMALL, oel
from tests.support.tiny_models import save_tiny_model, store_head

NEAR = 1e-3


def model_of(name: str, head: str, folder: Path) -> Path:
    """A "stored" head is tied, and the folder holds a copy of it, as those of Qwen3-0.6B and 1.7B do."""
    if name == "micro":
        shutil.copytree(resolve_model("micro", print), folder)
        if head == "untied":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    else:
        save_tiny_model(folder, name, tied=head != "untied")
    if head == "stored" or (name, head) == ("micro", "untied"):
        store_head(folder)
    assert ("lm_head.weight" in checkpoint_shapes(folder)) == (head != "tied")
    return folder


@torch.no_grad()
def off_greedy(policy: Path, said: list[tuple[list[int], list[int]]]) -> float:
    """By how much a word is less likely than the likeliest, by the trainer's model of a policy; at most."""
    model, worst = load_model(policy, torch.float32), 0.0
    for prompt, response in said:
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)
        worst = max(worst, (logits.amax(1) - chosen).max().item())
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("head", ["tied", "stored", "untied"])
@pytest.mark.parametrize("name", ["micro", "qwen3"])
def test_every_response_of_two_rounds_is_what_the_policy_of_its_step_would_write(
    name: str, head: str, tmp_path: Path
) -> None:
    model, folder = model_of(name, head, tmp_path / "model"), tmp_path / "run"
    settings = ["rounds=2", f"thinking={str(name == 'micro').lower()}"]
    finished = oel("run", "exact", f"model={model}", *SMALL, *settings, "--run-dir", str(folder))
    assert finished.returncode == 0, finished.stderr
    verified = oel("verify", str(folder), "--replay")
    assert verified.returncode == 0, verified.stdout
    policy = model
    for number in (1, 2):
        files = RoundFiles(folder / f"rounds/00{number}")
        games = read_jsonl(files.trajectories("consolidation"), Trajectory)
        prompts = {f"{game.id}/{at}": turn.prompt_ids for game in games for at, turn in enumerate(game.turns)}
        samples = [json.loads(line) for line in files.samples.read_text().splitlines()]
        evaluated = [turn for game in read_jsonl(files.evaluation_games, EvaluationGame) for turn in game.turns]
        said = [[(prompts[row["prefix_id"]], row["response_ids"]) for row in rows]
                for _, rows in groupby(samples, lambda row: row["step"])]  # fmt: skip
        said.append([(turn.prompt_ids, turn.response_ids) for turn in evaluated])
        writers = [policy, files.policy_after(1), files.policy]
        errors = [off_greedy(*pair) for pair in zip(writers, said, strict=True)]
        others = [off_greedy(*pair) for pair in zip([*writers[1:], writers[0]], said, strict=True)]
        print(f"round {number}: off the likeliest word after each sync {errors}, by the next policy {others}")
        assert max(errors) < NEAR < max(others)
        assert checkpoint_shapes(files.policy) == checkpoint_shapes(model)
        policy = files.policy
