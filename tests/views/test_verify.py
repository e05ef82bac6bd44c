"""Every promise, broken once: each tampering must be found, at the right file and line."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from oel_ray.errors import UserError
from oel_ray.records import EvaluationGame, Trajectory
from oel_ray.runs.files import fingerprint
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.layout import RoundFiles
from oel_ray.views.verify import verify
from tests.support import example_run
from tests.support.example_run import edit_json


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example_run.build(tmp_path_factory.mktemp("verify") / "run")


@pytest.fixture
def run(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "run"))


def findings(run: Path) -> list[str]:
    """Findings other than fingerprints: tests of content change files on purpose."""
    return [str(finding) for finding in verify(run) if "manifest says" not in str(finding) or "records" in str(finding)]


def reseal(files: RoundFiles) -> None:
    """Make the manifest agree with the files, so that only the check under test can find anything."""

    def change(manifest: dict[str, dict[str, dict[str, dict[str, object]]]]) -> None:
        for stage in manifest["stages"].values():
            stage["files"] = {name: fingerprint(files.root / name).model_dump() for name in stage["files"]}

    edit_json(files.manifest, change)


def test_a_clean_run_has_no_findings(clean: Path) -> None:
    assert verify(clean) == []


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        verify(tmp_path)


def test_a_file_with_changed_missing_or_no_bytes_is_found(run: Path) -> None:
    path = run / "rounds/001/policy/model.safetensors"
    path.write_bytes(bytes(4095) + b"x")
    assert [str(x) for x in verify(run)] == [
        "rounds/001/policy/model.safetensors: was changed: its sha256 is not the one in the manifest"
    ]
    path.write_bytes(b"")
    assert "has 0 bytes" in str(verify(run)[0])
    path.unlink()
    assert "is missing" in str(verify(run)[0])


GAMES, TEXT = "evaluation.jsonl", "knowledge/seed-00.json"
EXTRACTION, CONSOLIDATION = "trajectories/extraction.jsonl", "trajectories/consolidation.jsonl"
METRICS, SAMPLES = "consolidation/metrics.jsonl", "consolidation/samples.jsonl"
GATE = {"old": 0, "difference": -0.5, "difference_se": 0.1, "deployed": 1}
COLLECTED_MAP = example_run.trajectory(0, 1, "extraction", "extraction 0").map_hash


@pytest.mark.parametrize(
    ("name", "line", "change", "expected"),
    [
        (EXTRACTION, 1, lambda x: x.update(reward=1), f"{EXTRACTION}:2: is not a Trajectory: reward:"),
        (EXTRACTION, 1, lambda x: x.update(id="r001-x-0000"), f"{EXTRACTION}:2: id r001-x-0000 was"),
        (EXTRACTION, 0, lambda x: x.update(id="r001-x-0007"), f"{EXTRACTION}: r001-x-0000 is missing"),
        (EXTRACTION, 0, lambda x: x.update(id="r001-x-0007"), f"{EXTRACTION}: r001-x-0007 was never planned"),
        (
            EXTRACTION,
            1,
            lambda x: x["turns"][1].update(weight_version="r001"),
            f"{EXTRACTION}:2: r001-x-0001 was played by weights r001, deployed were r000",
        ),
        (EXTRACTION, 0, lambda x: x.update(round=2), "says round 2"),
        (EXTRACTION, 0, lambda x: x.update(split="consolidation"), "says split consolidation"),
        (EXTRACTION, 0, lambda x: x.update(turns=x["turns"] * 2), "has 4 turns"),
        (EXTRACTION, 0, lambda x: x.update(turns=[]), "has 0 turns"),
        (
            CONSOLIDATION,
            2,
            lambda x: x["turns"][0].update(feedback="?"),
            f"{CONSOLIDATION}:3: r001-c-0002: ",
        ),
        (TEXT, 0, lambda x: x.update(text="else"), "the text of r001-k00 is not its items joined"),
        (TEXT, 0, lambda x: x["items"][0].update(trajectory_id="nobody"), "refers to nobody"),
        (TEXT, 0, lambda x: x["items"][0].update(trajectory_id="r001-x-0000"), "not the last ones"),
        (TEXT, 0, lambda x: x["steps"][0].update(trajectory_id="r001-c-0000"), "no extraction trajectory"),
        (TEXT, 0, lambda x: x["steps"][0].update(trajectory_id="r001-x-0001"), "read a trajectory twice"),
        (TEXT, 0, lambda x: x["steps"].pop(0), "left 1 out"),
        (TEXT, 0, lambda x: x["steps"][1].update(index=5), "not numbered 0 to 1"),
        (TEXT, 0, lambda x: x.update(id="r001-k01"), "id r001-k01 was used before"),
        (TEXT, 0, lambda x: x.update(format="poem"), "is not a KnowledgeText"),
        (TEXT, 0, lambda x: x.update(round=2), "r001-k00 says round 2"),
        (METRICS, 1, lambda x: x.update(weight_version="r000.s0009.a0"), f"{METRICS}:2: weight version r000.s0009.a0"),
        (
            METRICS,
            1,
            lambda x: x.update(weight_version="r001.s0001.a0"),
            f"{METRICS}:2: weight version r001.s0001.a0 is",
        ),
        (METRICS, 1, lambda x: x.update(generated_by="r000"), f"{METRICS}:2: generated by weights r000"),
        (METRICS, 1, lambda x: x.update(weight_version="default"), f"{METRICS}:2: 'default' is not a weight version"),
        (METRICS, 1, lambda x: x.update(step=2), f"{METRICS}:2: step 2 follows step 0"),
        (METRICS, 1, lambda x: x.pop("loss"), f"{METRICS}:2: is not a StepRow: loss"),
        (METRICS, 1, lambda x: x.update(loss=None), f"{METRICS}:2: step 1 was applied, and its loss or KL"),
        (METRICS, 1, lambda x: x.update(kl_per_token=None), f"{METRICS}:2: step 1 was applied, and its loss or KL"),
        (SAMPLES, 1, lambda x: x.update(kl=None), f"{SAMPLES}:2: step 1 was applied, and this KL is not finite"),
        (SAMPLES, 1, lambda x: x.update(prefix_id="r001-c-0001/2"), f"{SAMPLES}:2: prefix"),
        (SAMPLES, 1, lambda x: x.update(prefix_id="r001-x-0001/0"), f"{SAMPLES}:2: prefix"),
        (
            SAMPLES,
            1,
            lambda x: x.update(prefix_id="r001-c-0000/1"),
            f"{SAMPLES}:2: id sample of r001-c-0000/1 was used",
        ),
        (SAMPLES, 1, lambda x: x.update(knowledge_id="r002-k00"), f"{SAMPLES}:2: knowledge text r002-k00"),
        (SAMPLES, 1, lambda x: x.update(step=7), f"{SAMPLES}:2: step 7"),
        (SAMPLES, 1, lambda x: x.update(weight_version="?"), f"{SAMPLES}:2: written by weights ?"),
        (GAMES, 3, lambda x: x.update(success=False), "evaluation.json: pass_rate is 0.75, the games give 0.625"),
        (
            GAMES,
            3,
            lambda x: x.update(condition="in_context"),
            f"{GAMES}:4: r001-p-h-0001-s1 says condition in_context",
        ),
        (GAMES, 3, lambda x: x.update(map_hash=COLLECTED_MAP), f"{GAMES}:4: held-out map {COLLECTED_MAP} was also"),
        (GAMES, 3, lambda x: x.update(id="r001-p-h-0001-s7"), f"{GAMES}: r001-p-h-0001-s1 is missing"),
        (GAMES, 3, lambda x: x["turns"][0].update(weight_version="r000"), "weights r000, deployed were r001"),
        ("in_context.jsonl", 3, lambda x: x.update(id="r001-k-h-0001-s1"), "r001-k-h-0001-s1-n1 is missing"),
        ("evaluation.json", 0, lambda x: x.update(gate=GATE), "the gate says 'the policy of round 0 gives way"),
        (GAMES, 3, lambda x: x.update(map_hash="new"), "holds 5 distinct maps, planned were 4"),
        ("in_context.jsonl", 8, lambda x: x.update(success=False), "in_context.pass_rate is 0.75"),
        ("evaluation.json", 0, lambda x: x.update(pass_rate=0.9), "pass_rate is 0.9, the games give 0.75"),
        ("evaluation.json", 0, lambda x: x.update(pass_rate_se=0.1), "pass_rate_se is 0.1, the games give 0.14"),
        ("evaluation.json", 0, lambda x: x.update(games=9), "games is 9, the games give 8"),
        ("evaluation.json", 0, lambda x: x.pop("pass_rate"), "is not an Evaluation: pass_rate"),
        ("evaluation.json", 0, lambda x: x.update(seeds=3), "seeds is 3, the games give 2"),
        ("evaluation.json", 0, lambda x: x.update(response_tokens_per_turn=3.0), "response_tokens_per_turn is 3.0"),
        ("evaluation.json", 0, lambda x: x["in_context"].update(pass_rate_se=0.1), "in_context.pass_rate_se is 0.1"),
        ("evaluation.json", 0, lambda x: x.update(in_context=None), "in_context and the games"),
        (
            "evaluation.json",
            0,
            lambda x: x["in_context_steps"][0].update(pass_rate=0.5),
            "in_context_steps.1.pass_rate is 0.5, the games give 0.375",
        ),
        ("evaluation.json", 0, lambda x: x.update(in_context_steps=[]), "in_context_steps has [], the games [1]"),
        ("in_context.jsonl", 0, lambda x: x.update(knowledge_step=5), "says knowledge after 5 steps, planned: [1, 2]"),
        ("in_context.jsonl", 0, lambda x: x.update(success=False), "in_context_steps.1.pass_rate is 0.375"),
    ],
)
def test_tampered_content_is_found_although_the_manifest_was_resealed(
    run: Path, name: str, line: int, change: Callable[[dict[str, object]], None], expected: str
) -> None:
    files = RunFolder(run).files(1)
    edit_json(files.root / name, change, line)
    reseal(files)
    found = findings(run)
    assert any(expected in finding for finding in found), found
    assert all(finding.startswith("rounds/001/") for finding in found)


def test_a_split_by_seed_allows_repeated_maps_but_no_repeated_seeds(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("split: by_map", "split: paper"))
    files = RunFolder(run).files(1)
    for line in (2, 3):
        edit_json(files.root / GAMES, lambda game: game.update(map_hash=COLLECTED_MAP), line)
    reseal(files)
    assert findings(run) == []
    edit_json(files.root / GAMES, lambda game: game.update(seed=1), 2)
    found = findings(run)
    assert any("evaluation.jsonl:3: held-out seed 1 was also collected: r001-x-0001" in line for line in found)
    assert any("holds 5 distinct maps, planned were 4" in line for line in found)


@pytest.mark.parametrize("restarted_with", ["r001.s0001.a1", "r001.s0001.a3"])
def test_an_attempt_may_go_on_with_checkpoint_weights_if_versions_never_go_back(run: Path, restarted_with: str) -> None:
    files = RunFolder(run).files(1)
    attempt = restarted_with.rpartition(".")[2]
    edit_json(files.consolidation_metrics, lambda row: row.update(generated_by=restarted_with), 1)
    edit_json(files.samples, lambda row: row.update(weight_version=restarted_with), 1)
    for line, step in ((1, 2), (2, 3)):
        version = f"r001.s{step:04d}.{attempt}"
        edit_json(files.consolidation_metrics, lambda row, v=version: row.update(weight_version=v), line)
    edit_json(files.consolidation_metrics, lambda row: row.update(generated_by=f"r001.s0002.{attempt}"), 2)
    edit_json(files.samples, lambda row: row.update(weight_version=f"r001.s0002.{attempt}"), 2)
    reseal(files)
    assert findings(run) == []
    edit_json(files.consolidation_metrics, lambda row: row.update(weight_version="r001.s0003.a0"), 2)
    reseal(files)
    expected = (
        "rounds/001/consolidation/metrics.jsonl:3: weight version r001.s0003.a0 is not newer than the one before it"
    )
    assert expected in findings(run)


@pytest.mark.parametrize(
    ("setting", "writers"),
    [
        ("max_staleness: 1", ["r000", "r000", "r001.s0001.a0"]),
        ("responses: teacher", ["r000", "r000", "r000"]),
    ],
)
def test_responses_of_weights_other_than_the_configured_ones_are_found(
    run: Path, setting: str, writers: list[str]
) -> None:
    files = RunFolder(run).files(1)
    for line, writer in enumerate(writers):
        edit_json(files.consolidation_metrics, lambda row, writer=writer: row.update(generated_by=writer), line)
        edit_json(files.samples, lambda row, writer=writer: row.update(weight_version=writer), line)
    reseal(files)
    assert "rounds/001/consolidation/metrics.jsonl:2: generated by weights r000, the engines served r001.s0001.a0" in (
        findings(run)
    )
    config, name = run / "config.yaml", setting.partition(":")[0]
    config.write_text(re.sub(f"  {name}: .*", f"  {setting}", config.read_text()))
    assert not [finding for finding in findings(run) if finding.startswith("rounds/001/")]


def test_a_skipped_step_without_numbers_is_no_finding(run: Path) -> None:
    files = RunFolder(run).files(1)
    example_run.skip_step(files, 1)
    reseal(files)
    assert findings(run) == []


@pytest.mark.parametrize("name", [EXTRACTION, CONSOLIDATION, METRICS, SAMPLES, GAMES, "in_context.jsonl"])
def test_a_lost_last_line_is_found(run: Path, name: str) -> None:
    files = RunFolder(run).files(1)
    path = files.root / name
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    reseal(files)
    found = findings(run)
    assert any(f"{name}: holds" in finding and "the manifest says" in finding for finding in found)
    assert name == SAMPLES or any(f"{name}: holds" in finding and "planned were" in finding for finding in found)


def test_a_lost_knowledge_text_is_found(run: Path) -> None:
    RunFolder(run).files(1).knowledge(1).unlink()
    found = findings(run)
    assert "rounds/001/knowledge/seed-01.json: is missing" in found
    assert "rounds/001/knowledge: holds 1 knowledge texts, planned were 2" in found


def test_a_torn_line_is_found_with_its_number(run: Path) -> None:
    path = RunFolder(run).files(1).evaluation_games
    path.write_bytes(path.read_bytes()[:-40])
    assert any("evaluation.jsonl:8: is not a EvaluationGame: Invalid JSON" in finding for finding in findings(run))


def test_a_gate_that_names_no_round_is_found(run: Path) -> None:
    edit_json(RunFolder(run).files(1).evaluation, lambda x: x.update(gate=GATE | {"deployed": "none"}))
    assert any("evaluation.json: is not an Evaluation: gate.deployed" in finding for finding in findings(run))


def test_a_missing_stage_is_found_only_if_the_run_says_finished(run: Path) -> None:
    edit_json(RunFolder(run).files(2).manifest, lambda manifest: manifest["stages"].pop("consolidate"))
    assert findings(run) == ["rounds/002/MANIFEST.json: lacks stage consolidate, although the run says finished"]
    shutil.rmtree(run / "rounds/002")
    assert len(findings(run)) == 5
    edit_json(run / "status.json", lambda status: status.update(state="interrupted"))
    assert findings(run) == []


def test_a_round_that_was_never_planned_is_found(run: Path) -> None:
    shutil.copytree(run / "rounds/002", run / "rounds/003")
    assert any("was never planned" in finding for finding in findings(run))


def test_broken_status_manifest_metrics_and_configuration_files_are_found(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"a": 1}\n{"a"')
    (run / "status.json").write_text("")
    (run / "rounds/001/MANIFEST.json").write_text("{}")
    found = findings(run)
    assert found[0].startswith("status.json: cannot be read")
    assert found[1].startswith("rounds/001/MANIFEST.json: is no manifest")
    assert "metrics.jsonl:2: is not JSON" in found
    (run / "config.yaml").write_text("rounds: [")
    assert findings(run)[0].startswith("config.yaml: cannot be read")


def test_the_replay_overrules_the_recorded_success_and_rates(run: Path) -> None:
    def honest(game: Trajectory) -> tuple[bool, str]:
        assert isinstance(game, EvaluationGame)
        return game.success, ""

    assert verify(run, honest) == []

    def one_lost(game: Trajectory) -> tuple[bool, str]:
        assert isinstance(game, EvaluationGame)
        lost = game.id == "r002-p-h-0000-s0"
        return game.success and not lost, "turn 1 shows another board" * lost

    assert [str(x) for x in verify(run, one_lost)] == [
        "rounds/002/evaluation.jsonl:1: r002-p-h-0000-s0 says success=True, its replay gives False",
        "rounds/002/evaluation.jsonl:1: the replay differs: turn 1 shows another board",
        "rounds/002/evaluation.json: pass_rate is 0.75, the games give 0.625",
        "rounds/002/evaluation.json: pass_rate_se is 0.14433756729740643, the games give 0.239357",
    ]


def test_a_finding_is_one_line_even_if_the_data_holds_line_breaks(run: Path) -> None:
    path = RunFolder(run).files(1).evaluation_games
    path.write_bytes(orjson.dumps({"id": "a\nb"}) + b"\n")
    assert all("\n" not in str(finding) for finding in verify(run))
