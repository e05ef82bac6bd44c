"""The gate: whose policy is deployed, and that all of the next round follows it. Engines and players are stand-ins."""

import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from oel_ray import loop
from oel_ray.config.schema import GateConfig
from oel_ray.errors import UserError
from oel_ray.play.players import Game
from oel_ray.play.scores import passed_gate
from oel_ray.preflight import config_from_round
from oel_ray.records import EvaluationGame, Trajectory
from oel_ray.runs import layout
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.schedule import check_ready, planned_stages
from oel_ray.runs.stage import Stage
from oel_ray.telemetry.progress import Progress
from oel_ray.telemetry.run import Telemetry
from oel_ray.views.report.data import read_report
from oel_ray.views.show import remarks
from oel_ray.views.verify import verify
from tests.support import example_run

GATED = {"gate": {"enabled": True}, "model": "micro"}
KEPT = "the policy of round 0 stays: the new one's pass rate differs by -100.0 ± 0.0 points"


def games(wins: Sequence[Sequence[bool]]) -> list[EvaluationGame]:
    """A game for every map and seed."""
    (game, *_) = example_run.games(1, "policy")
    return [
        game.model_copy(update={"map_hash": f"m{number}", "sampling_seed": seed, "success": won})
        for number, of_map in enumerate(wins)
        for seed, won in enumerate(of_map)
    ]


def test_a_policy_is_rejected_only_if_its_loss_exceeds_the_allowance_and_the_noise() -> None:
    old, new = games([[True, True]] * 4), games([[True, True], [True, True], [False, True], [False, False]])
    gate = passed_gate(3, old, 4, new, GateConfig(standard_errors=1.5))
    assert (gate.difference, gate.old) == (-0.375, 3)
    assert gate.difference_se == pytest.approx(0.239357, abs=1e-6)
    for settings, deployed in (
        (GateConfig(standard_errors=1.5), 3),
        (GateConfig(standard_errors=1.6), 4),
        (GateConfig(standard_errors=1.5, max_loss=0.1), 4),
        (GateConfig(standard_errors=0, max_loss=0.375), 4),
        (GateConfig(standard_errors=0, max_loss=0.37), 3),
    ):
        assert passed_gate(3, old, 4, new, settings).deployed == deployed, settings


@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=1, max_size=6))
def test_what_is_as_good_on_every_map_is_deployed(wins: list[list[bool]]) -> None:
    again = games([of_map[::-1] for of_map in wins])
    gate = passed_gate(0, games(wins), 1, again, GateConfig(standard_errors=0))
    assert (gate.difference, gate.difference_se, gate.deployed) == (0, 0, 1)


class Engines:
    """Takes the place of the pool: which policies were deployed, in order."""

    client = engines = None

    def enter(self, round_number: int, stage: str) -> None:
        pass

    def __init__(self) -> None:
        self.deployed: list[tuple[Path, str]] = []

    def deploy(self, policy: Path, version: str) -> None:
        self.deployed.append((policy, version))

    def counts(self) -> Counter[str]:
        return Counter()


class Players:
    """Every game is won, but for those of round 1's policy."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def play(
        self,
        games: Sequence[Game],
        on_progress: Callable[[int], None],
        on_played: Callable[[Game, Trajectory, bool], None],
    ) -> None:
        version = self._engines.deployed[-1][1]
        told = {"instructions": "Go.", "template": "t", "outcome": "", "ended_by": "environment"}
        for game in games:
            trajectory = Trajectory(**game.episode.model_dump(), **told, turns=example_run.turns(version))
            on_played(game, trajectory, version != "r001")

    def pop_failures(self) -> dict[str, int]:
        return {}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Engines, str]:
    """A run of two rounds, the first of which makes the policy worse; its engines, and what was said."""
    engines, said = Engines(), io.StringIO()
    config = example_run.small_config(**GATED)
    with RunFolder.create(tmp_path_factory.mktemp("gated") / "run", config) as folder:
        progress = Progress(folder, Console(file=said, width=200))
        loop.prepare(config, folder, progress)
        stand_ins: Any = (engines, Players(engines))
        telemetry = Telemetry(folder, progress, *stand_ins, lambda group, row, step: None)
        rounds = loop.Rounds(config, folder, progress, *stand_ins, telemetry, on_gpu=False)
        for number in range(3):
            for name in planned_stages(config, number):
                if name in (layout.COLLECT, layout.EVALUATE, layout.EVALUATE_IN_CONTEXT):
                    getattr(rounds, name)(number)
                elif name == layout.CONSOLIDATE:
                    example_run.consolidate(Stage(folder, number, name), folder.deployed(number))
                elif name == layout.EXTRACT:
                    example_run.extract(Stage(folder, number, name))
    return folder.path, engines, said.getvalue()


def test_the_next_round_plays_learns_and_starts_from_the_policy_that_was_kept(run: tuple[Path, Engines, str]) -> None:
    path, engines, said = run
    folder = RunFolder.open(path)
    assert [folder.deployed(number) for number in range(4)] == [0, 0, 0, 2]
    base, first, second = (folder.policy(number) for number in range(3))
    assert engines.deployed == [(base, "r000"), (first, "r001"), (base, "r000"), (second, "r002")]
    assert config_from_round(folder, 2).model == str(base)
    assert f"round 1: {KEPT}\n" in said
    assert verify(path) == []


def test_metrics_show_and_report_say_which_policy_was_kept(run: tuple[Path, Engines, str]) -> None:
    path, _, _ = run
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    deployed = {row["round"]: row["deployed"] for row in rows if row["stage"] == "evaluate"}
    assert deployed == {0: 0, 1: 0, 2: 2}
    said = [f"round 1: {KEPT}", f"round 2: {KEPT.replace('stays', 'gives way').replace('-100', '+0')}"]
    assert remarks(path) == read_report(path).remarks == said


def test_verify_finds_a_gate_that_contradicts_the_games(run: tuple[Path, Engines, str]) -> None:
    folder = RunFolder.open(run[0])
    evaluation = folder.files(1).evaluation
    before = evaluation.read_bytes()
    try:
        example_run.edit_json(evaluation, lambda value: value["gate"].update(deployed=1))
        found = [str(finding) for finding in verify(run[0])]
    finally:
        evaluation.write_bytes(before)
    assert any(
        line.startswith("rounds/001/evaluation.json: the gate says 'the policy of round 0 gives") for line in found
    )
    assert any("r002-x-0000 was played by weights r000, deployed were r001" in line for line in found)


def test_a_gate_needs_evaluations() -> None:
    with pytest.raises(UserError, match=r"gate.enabled=true .*: set evaluate.enabled=true"):
        example_run.small_config(**GATED, evaluate={"enabled": False})
    config = example_run.small_config(**GATED)
    committed = {0: {"prepare", "evaluate"}, 1: {"collect", "extract", "consolidate"}}
    with pytest.raises(UserError, match="the gate compares with round 1, which is to be evaluated first"):
        check_ready(config, committed, 2, "collect")
    check_ready(config, committed, 1, "evaluate")
    with pytest.raises(UserError, match="the gate compares with round 0"):
        check_ready(config, committed | {0: {"prepare"}}, 1, "evaluate")
