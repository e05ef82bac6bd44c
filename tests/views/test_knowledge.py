"""What was learned, as a list, as a difference, and without what one game taught."""

from pathlib import Path

import pytest

from oel_ray.errors import UserError
from oel_ray.extract.items import growth
from oel_ray.runs import takeback
from oel_ray.runs.folder import RunFolder
from oel_ray.views import knowledge
from oel_ray.views.verify import verify
from tests.support import example_run

LAST = "r001-x-0001"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return example_run.build(tmp_path / "run")


def test_the_listing_has_one_line_for_each_knowledge_text(run: Path) -> None:
    example_run.edit_json(
        run / "rounds/001/knowledge/seed-01.json", lambda text: text["steps"][0].update(rejected={"url": 2, "code": 1})
    )
    assert knowledge.listing(RunFolder.open(run)) == [
        "r001-k00: 1 items of 1 games, 7 tokens",
        "r001-k01: 1 items of 1 games, 7 tokens, 1 rejected for code, 2 rejected for url",
        "r002-k00: 1 items of 1 games, 7 tokens",
        "r002-k01: 1 items of 1 games, 7 tokens",
    ]


def test_two_texts_are_compared_item_by_item(run: Path) -> None:
    example_run.edit_json(
        run / "rounds/002/knowledge/seed-00.json", lambda text: text["items"][0].update(text="another thing")
    )
    folder = RunFolder.open(run)
    assert knowledge.difference(folder, "r001-k00", "r001-k01") == []
    assert knowledge.difference(folder, "r001-k00", "r002-k00") == [
        f"- - EXPERIENCE ITEM: thing 1  ({LAST})",
        "+ another thing  (r002-x-0001)",
    ]
    with pytest.raises(UserError, match="no knowledge text r009-k00"):
        knowledge.difference(folder, "r001-k00", "r009-k00")


def test_dropping_a_game_withdraws_its_items_and_every_stage_that_used_them(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with RunFolder.resume(run, None) as folder:
        again = takeback.drop(folder, LAST, len)
    assert again == [
        *(f"{name} of round 2" for name in ("collect", "extract", "evaluate_in_context", "consolidate", "evaluate")),
        *(f"{name} of round 1" for name in ("evaluate_in_context", "consolidate", "evaluate")),
    ]
    assert verify(run) == []
    kept = folder.knowledge_texts()
    assert {text.id: (text.text, text.items, text.tokens, text.withdrawn) for text in kept.values()} == {
        name: ("", [], 0, [LAST]) for name in ("r001-k00", "r001-k01")
    }
    assert [text.items for text in growth([kept["r001-k00"]], [1])[0]] == [
        [item] for item in [example_run.knowledge_text(1, 0).items[0].model_copy(update={
            "text": "- EXPERIENCE ITEM: thing 0", "trajectory_id": "r001-x-0000"})]
    ]  # fmt: skip
    there = [path.relative_to(folder.quarantine) for path in folder.quarantine.rglob("*") if path.is_file()]
    assert {(folder.quarantine / path).read_bytes() for path in there} <= set(before.values())
    assert (folder.quarantine / "rounds/002/trajectories/extraction.jsonl").exists()
    assert not (run / "rounds/001/policy/model.safetensors").exists()
    with RunFolder.resume(run, None) as folder:
        assert example_run.run_stages(folder) == [
            "1:evaluate_in_context", "1:consolidate", "1:evaluate",
            "2:collect", "2:extract", "2:evaluate_in_context", "2:consolidate", "2:evaluate",
        ]  # fmt: skip
    assert verify(run) == []


def test_dropping_a_game_that_taught_nothing_is_refused_by_name(run: Path) -> None:
    with RunFolder.resume(run, None) as folder, pytest.raises(UserError, match=r"nothing in .* was learned from 'x'"):
        takeback.drop(folder, "x", len)
    assert verify(run) == []
