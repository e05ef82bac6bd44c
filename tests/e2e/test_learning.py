"""That learning happens, and stops when a condition of it is taken away: the quickstart, smaller."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from oel_ray.records import KnowledgeText, Trajectory, read_jsonl
from oel_ray.runs.layout import RoundFiles
from tests.e2e.test_run import oel

SMALLER = [
    "rounds=1",
    "consolidate.steps=14",
    "consolidate.learning_rate=3e-4",
    "evaluate.maps=48",
    "evaluate.seeds=1",
    "evaluate.in_context=false",
]
TRUE = {"- EXPERIENCE ITEM: Holes are marked H.", "- EXPERIENCE ITEM: The goal is marked G."}
PROOF = {"Holes are marked": "You fell into a hole!", "The goal is marked": "You reached the goal!"}


def pass_rate(folder: Path, number: int) -> float:
    return float(json.loads((folder / f"rounds/{number:03d}/evaluation.json").read_text())["pass_rate"])


def tokens(folder: Path, number: int) -> float:
    values = json.loads((folder / f"rounds/{number:03d}/evaluation.json").read_text())
    return float(values["response_tokens_per_turn"])


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "learned"
    finished = oel("run", "quickstart", *SMALLER, "--run-dir", str(folder))
    assert finished.returncode == 0, finished.stderr
    return folder


def test_a_round_of_experience_is_worth_many_won_games_and_shortens_responses(learned: Path) -> None:
    assert pass_rate(learned, 1) >= pass_rate(learned, 0) + 0.25
    assert tokens(learned, 1) <= 0.95 * tokens(learned, 0)


def test_what_was_learned_is_true_and_each_item_is_proved_by_its_game(learned: Path) -> None:
    files = RoundFiles(learned / "rounds/001")
    games = {game.id: game for game in read_jsonl(files.trajectories("extraction"), Trajectory)}
    items = [item for path in files.knowledge_files() for item in KnowledgeText.from_json(path.read_bytes()).items]
    true = [item for item in items if item.text in TRUE]
    assert len(true) >= 0.9 * len(items)
    # Who knows nothing of the game loses it, so holes are what a first round learns about.
    assert "- EXPERIENCE ITEM: Holes are marked H." in {item.text for item in true}
    for item in true:
        (proof,) = (sign for phrase, sign in PROOF.items() if phrase in item.text)
        assert proof in games[item.trajectory_id].outcome


# The other way round: the same round with one thing taken away. What is left must not do better than chance allows.


@pytest.mark.slow
@pytest.mark.parametrize(
    "knowledge",
    [
        pytest.param(
            "- EXPERIENCE ITEM: Holes are marked K.\n- EXPERIENCE ITEM: The goal is marked R.\n", id="strangers"
        ),
        pytest.param("Nothing was learned.\n", id="nothing"),
    ],
)
def test_nothing_is_learned_from_a_teacher_that_knows_nothing_of_this_game(knowledge: str, tmp_path: Path) -> None:
    folder, text = tmp_path / "run", tmp_path / "knowledge.txt"
    text.write_text(knowledge)
    for command in (
        ["evaluate", str(folder), "--config", "quickstart", *SMALLER],
        ["collect", str(folder)],
        ["consolidate", str(folder), "--knowledge", str(text)],
        ["evaluate", str(folder), "--round", "1"],
    ):
        finished = oel(*command)
        assert finished.returncode == 0, finished.stderr
    assert pass_rate(folder, 1) <= pass_rate(folder, 0) + 0.15


@pytest.mark.slow
def test_nothing_is_learned_if_the_weights_never_reach_the_engines(tmp_path: Path) -> None:
    """A patch that every process loads at its start makes engines take a new version without new weights."""
    patches = tmp_path / "patches"
    patches.mkdir()
    shutil.copy(Path(__file__).with_name("stale_engines.py"), patches / "sitecustomize.py")
    folder = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(patches), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "oel_ray", "run", "quickstart", *SMALLER, "--run-dir", str(folder)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert finished.returncode == 0, finished.stderr
    assert pass_rate(folder, 1) <= pass_rate(folder, 0) + 0.15
