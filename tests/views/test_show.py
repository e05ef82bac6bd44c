"""What a person reads."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from oel_ray.errors import UserError
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.stage import Stage
from oel_ray.views.show import next_steps, show, summary_table
from tests.support import example_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example_run.build(tmp_path_factory.mktemp("show") / "run")


def rendered(path: Path, identifier: str | None, width: int = 80) -> str:
    output = io.StringIO()
    show(path, identifier, Console(file=output, width=width))
    return output.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_overview_fits_the_terminal_and_shows_every_number(run: Path, width: int) -> None:
    output = io.StringIO()
    Console(file=output, width=width).print(summary_table(run))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    first = next(line.split() for line in lines if line.strip().startswith("1 "))
    assert first == ["1", "75.0±14.4", "11.0", "100.0", "75.0", "2.0", "1.0", "0.4→0.13", "collect", "0:00"]
    untouched = next(line.split() for line in lines if line.strip().startswith("0 "))
    assert untouched == ["0", "75.0±14.4", "11.0", "100.0", "-", "2.0", "-", "-", "prepare", "0:00"]
    assert "…" not in output.getvalue()
    for stage in ("collect", "extract", "in context", "consolidate", "evaluate"):
        assert stage in output.getvalue()


def test_a_skipped_step_is_counted_and_shown_without_a_number(tmp_path: Path) -> None:
    path = example_run.build(tmp_path / "run")
    example_run.skip_step(RunFolder(path).files(1), 2)
    for step in range(3):
        example_run.skip_step(RunFolder(path).files(2), step)
    text = rendered(path, None)
    rows = [line.split() for line in text.splitlines() if line.strip().startswith(("1 ", "2 "))]
    assert [row[7] for row in rows] == ["0.4→-", "-→-"]
    assert "round 1: 1 of 3 steps skipped: loss or gradient not finite\n" in text
    assert "round 2: 3 of 3 steps skipped: loss or gradient not finite\n" in text


def test_the_overview_can_be_shown_before_the_first_stage_has_ended(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", example_run.small_config()) as folder:
        assert "running" in rendered(folder.path, None)
        example_run.prepare(Stage(folder, 0, "prepare"), Path("m"))
        assert "prepare" in rendered(folder.path, None)


def test_a_game_is_shown_turn_by_turn(run: Path) -> None:
    text = rendered(run, "r001-p-h-0000-s1")
    for part in (*example_run.BOARDS, "I try [down], [bold]attempt[/bold] 0", "turn 1: 2 tokens", "not won"):
        assert part in text
    assert "won" not in rendered(run, "r001-x-0000")


def test_control_characters_are_made_visible(run: Path, tmp_path: Path) -> None:
    path = example_run.build(tmp_path / "run")
    games = RunFolder(path).files(1).trajectories("extraction")
    example_run.edit_json(games, lambda game: game["turns"][0].update(response="\x1b[2Jgone\x9b"))
    text = rendered(path, "r001-x-0000")
    assert "\\x1b[2Jgone\\x9b" in text
    assert "\x1b" not in text


def test_a_knowledge_text_names_its_sources(run: Path) -> None:
    text = rendered(run, "r001-k00")
    assert "- EXPERIENCE ITEM: thing 1\n    from r001-x-0001\n" in text
    assert "2 trajectories read: 2 added" in text
    assert "items dropped for length: 1; not taken: none" in text


def test_an_unknown_id_names_near_ones(run: Path) -> None:
    with pytest.raises(UserError, match="did you mean r001-k0"):
        rendered(run, "r001-k09")


def test_the_suggested_next_steps_name_paths_and_ids_that_exist(run: Path) -> None:
    places = dict(line.split(":", 1) for line in next_steps(run).splitlines())
    assert Path(places["the policy"].strip()).is_dir()
    assert places["as a page"].split() == ["oel", "report", str(run)]
    rendered(run, places["a game"].split()[-1])
    rendered(run, places["what it learned"].split()[-1])
