"""`oel report` on run folders built by hand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest

from oel_ray.errors import UserError
from oel_ray.records import EvaluationGame, KnowledgeText
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.stage import Stage
from oel_ray.views.report.data import choose_pairs, read_report
from oel_ray.views.report.figures import canvas_and_axes, figures
from oel_ray.views.report.page import write_report
from tests.support.example_run import STAGES, build, edit_json, games, skip_step, small_config

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("runs") / "example")


def test_the_report_reads_the_numbers_that_the_run_recorded(run: Path) -> None:
    report = read_report(run)
    assert [data.number for data in report.rounds] == [0, 1, 2]
    first, second, _ = report.rounds
    assert first.policy is not None
    assert (first.policy.pass_rate, first.policy.random, first.policy.oracle) == (0.75, 0.11, 1.0)
    assert (first.in_context, first.kl, first.knowledge) == ({}, [], [])
    assert {step: value.pass_rate for step, value in second.in_context.items()} == {1: 3 / 8, 2: 6 / 8}
    assert second.in_context[1].pass_rate_se == 0.125  # maps won in 1/2, 1/2, 0 and 1/2 of their games
    assert second.with_all_knowledge == second.in_context[2]
    assert second.kl == pytest.approx([0.4, 0.2, 0.4 / 3])
    assert [(text.id, text.read) for text in second.knowledge] == [("r001-k00", 2), ("r001-k01", 2)]
    (item,) = second.knowledge[0].items
    assert item == ("thing 1", 1, ["r001-x-0001"])
    assert list(second.read) == ["r001-x-0000", "r001-x-0001"]
    assert second.items_per_text == 1


def test_a_skipped_step_is_a_gap_in_the_curve_and_a_note_on_the_page(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    skip_step(RunFolder(run).files(1), 0)
    edit_json(RunFolder(run).files(1).consolidation_metrics, lambda row: row.update(kl_per_token=-0.5), 1)
    for step in range(3):
        skip_step(RunFolder(run).files(2), step)
    report = read_report(run)
    assert report.rounds[1].kl == [None, -0.5, pytest.approx(0.4 / 3)]
    (figure,) = (figure for figure, _, _ in figures(report) if figure.name == "reverse_kl")
    with canvas_and_axes(wide=False) as (_, axes):
        figure.draw(report, axes)
        drawn = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 3]
        assert axes.get_ylim()[0] == -0.5
    assert [list(np.isnan(values.astype(float))) for values in drawn] == [[True, False, False], [True] * 3]
    page = write_report(run).read_text()
    assert "<td>- → 0.133</td>" in page
    assert "<td>- → -</td>" in page
    assert "round 1: 1 of 3 steps skipped: loss or gradient not finite" in page


def test_the_headline_has_both_rates_with_their_intervals(run: Path) -> None:
    headline = read_report(run).headline
    assert "wins 75 ± 28 % of the held-out games before and 75 ± 28 % after round 2" in headline  # 1.96 * 0.1443
    assert "(95 % intervals; a random player 11 %, a perfect one 100 %)" in headline
    assert "2.0 tokens per turn before and 2.0 after round 2, 1.00 times as many" in headline


def test_with_fewer_than_two_evaluations_the_headline_claims_no_change(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", small_config()) as folder:
        assert read_report(folder.path).headline == "No policy has been evaluated yet."
        for name in ("prepare", "evaluate"):
            STAGES[name](Stage(folder, 0, name))
        assert read_report(folder.path).headline == (
            "The policy wins 75 ± 28 % of the held-out games before "
            "(95 % interval; a random player 11 %, a perfect one 100 %)."
        )
        assert "running in round" not in write_report(folder.path).read_text()
        folder.set_status("running", round=1, stage="collect", done=3, total=5)
        assert "running in round 1, collect 3/5" in write_report(folder.path).read_text()


def test_the_first_pair_of_games_shown_was_lost_before_and_is_won_after() -> None:
    before, after = games(0, "policy"), games(1, "policy")
    changed = [
        game.model_copy(update={"success": not game.success}) if n == 5 else game for n, game in enumerate(after)
    ]
    before = [game.model_copy(update={"success": False}) if n == 5 else game for n, game in enumerate(before)]
    changed[5] = changed[5].model_copy(update={"success": True})
    pairs = choose_pairs(before, changed, 3)
    assert (pairs[0].before.success, pairs[0].after.success) == (False, True)
    assert all(pair.before.map_hash == pair.after.map_hash for pair in pairs)
    assert all(pair.before.sampling_seed == pair.after.sampling_seed for pair in pairs)
    assert len({pair.before.map_hash for pair in pairs}) == 3


def test_equal_items_are_shown_once(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    file = run / "rounds/001/knowledge/seed-00.json"
    text = KnowledgeText.from_json(file.read_bytes())
    (said,) = text.items
    rare = said.model_copy(update={"text": "- EXPERIENCE ITEM: said once"})
    earlier = said.model_copy(update={"trajectory_id": "r001-x-0000"})
    file.write_bytes(text.model_copy(update={"items": [rare, said, earlier, said]}).to_json())
    items = read_report(run).rounds[1].knowledge[0].items
    assert items == [
        ("thing 1", 3, ["r001-x-0001", "r001-x-0000"]),
        ("said once", 1, ["r001-x-0001"]),
    ]
    assert "3</b>" in write_report(run).read_text()


def test_every_item_leads_to_the_games_behind_it(run: Path, tmp_path: Path) -> None:
    page = write_report(run, tmp_path).read_text()
    targets = set(re.findall(r'<a href="#([^"]+)"', page))
    assert targets == {"r001-x-0001", "r002-x-0001"}
    assert all(page.count(f'id="{target}"') == 1 for target in targets)


def test_knowledge_from_elsewhere_names_its_source(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    edit_json(run / "rounds/001/MANIFEST.json", lambda manifest: as_import(manifest["stages"]))
    file = run / "rounds/001/knowledge/seed-00.json"
    edit_json(file, lambda text: text["items"][0].update(trajectory_id="elsewhere"))
    data = read_report(run).rounds[1]
    assert (data.knowledge[0].items[0].sources, data.read) == (["elsewhere"], {})
    assert '<div class="quiet">from elsewhere</div>' in write_report(run).read_text()


def as_import(stages: dict[str, object]) -> None:
    stages["import_knowledge"] = stages.pop("extract")
    del stages["collect"]


@pytest.mark.process
def test_the_page_loads_nothing_and_is_the_same_to_the_byte_each_time(run: Path, tmp_path: Path) -> None:
    page = write_report(run, tmp_path / "a")
    text = page.read_text()
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!#)", text), "the page loads something"
    assert "@import" not in text
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    assert text.count("<svg") == 4
    assert "<script" not in text
    assert "default-src 'none'" in text
    command = [sys.executable, "-m", "oel_ray", "report", str(run), "--out", str(tmp_path / "b")]
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (again.stdout, again.stderr) == (f"{tmp_path / 'b' / 'report.html'}\n", "")
    assert Path(again.stdout.strip()).read_bytes() == page.read_bytes()
    for name in ("pass_rate", "tokens", "reverse_kl", "time"):
        png = (tmp_path / "a" / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert png == (tmp_path / "b" / f"{name}.png").read_bytes()


def test_html_written_by_games_and_models_is_escaped(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    game_file, text_file = run / "rounds/000/evaluation.jsonl", run / "rounds/001/knowledge/seed-00.json"
    lines = [EvaluationGame.from_json(line) for line in game_file.read_bytes().splitlines()]
    hostile = [
        line.turns[0].model_copy(update={"response": SCRIPT, "observation": SCRIPT, "action": SCRIPT}) for line in lines
    ]
    changed = [
        line.model_copy(update={"turns": [turn], "outcome": SCRIPT}) for line, turn in zip(lines, hostile, strict=True)
    ]
    game_file.write_bytes(b"".join(line.to_json() + b"\n" for line in changed))
    text = KnowledgeText.from_json(text_file.read_bytes())
    items = [text.items[0].model_copy(update={"text": SCRIPT})]
    text_file.write_bytes(text.model_copy(update={"items": items}).to_json())
    page = write_report(run).read_text()
    assert SCRIPT not in page
    assert page.count("&lt;script&gt;") > 5


@pytest.mark.parametrize("done", range(8))
def test_the_page_of_an_unfinished_run_says_not_yet(done: int, tmp_path: Path) -> None:
    plan = [(0, "prepare"), (0, "evaluate"), (1, "collect"), (1, "extract")]
    plan += [(1, "evaluate_in_context"), (1, "consolidate"), (1, "evaluate"), (2, "collect")]
    with RunFolder.create(tmp_path / "run", small_config()) as folder:
        for number, name in plan[:done]:
            STAGES[name](Stage(folder, number, name))
    page = write_report(tmp_path / "run").read_text()
    assert ("Not yet" in page) == (done < 7)


def test_games_kept_before_their_evaluation_are_shown(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", small_config()) as folder:
        for number, name in [(0, "prepare"), (1, "collect"), (1, "extract"), (1, "evaluate_in_context")]:
            STAGES[name](Stage(folder, number, name))
    assert read_report(tmp_path / "run").evaluated == []
    page = write_report(tmp_path / "run").read_text()
    assert "75 ± 28 %" in page and "not yet" in page


def test_a_report_changes_nothing_else_in_the_run(run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if "report" not in path.parts}
    write_report(run, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if "report" not in path.parts}


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_samples_of_a_round_are_counted(run: Path) -> None:
    samples = (run / "rounds/001/consolidation/samples.jsonl").read_bytes().splitlines()
    assert read_report(run).rounds[1].counts["samples"] == len([orjson.loads(line) for line in samples])
