"""A policy that training spoils is kept from being deployed, and the next round begins with the one before."""

import json
from pathlib import Path

import pytest

from tests.e2e.test_run import oel

SETTINGS = [
    "rounds=2",
    "collect.extraction_games=4",
    "extract.seeds=1",
    "consolidate.steps=2",
    "consolidate.games_per_step=4",
    "consolidate.learning_rate=0.05",
    "evaluate.maps=64",
    "evaluate.seeds=1",
    "evaluate.in_context=false",
    "engines.count=1",
    "gate.enabled=true",
    "gate.standard_errors=0",
]


@pytest.mark.slow
def test_a_policy_that_training_spoils_is_not_deployed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = oel("run", "quickstart", *SETTINGS, "--run-dir", str(folder))
    assert ended.returncode == 0, ended.stderr
    before = json.loads((folder / "rounds/000/evaluation.json").read_text())
    assert before["pass_rate"] > 0, "nothing to be spoiled"
    assert "round 1: the policy of round 0 stays: the new one's pass rate differs by -" in ended.stderr
    gates = [json.loads((folder / f"rounds/00{number}/evaluation.json").read_text())["gate"] for number in (1, 2)]
    assert [(gate["old"], gate["deployed"]) for gate in gates] == [(0, 0), (0, 0)]
    played = (folder / "rounds/002/trajectories/extraction.jsonl").read_text().splitlines()
    assert {turn["weight_version"] for line in played for turn in json.loads(line)["turns"]} == {"r000"}
    steps = (folder / "rounds/002/consolidation/metrics.jsonl").read_text().splitlines()
    assert json.loads(steps[0])["generated_by"] == "r000"
    assert json.loads(steps[0])["kl_per_token"] < 1, "student and teacher are both the policy that was kept"
    verified = oel("verify", str(folder), "--replay")
    assert verified.returncode == 0, verified.stdout
    assert "the policy of round 0 stays" in oel("show", str(folder)).stdout
