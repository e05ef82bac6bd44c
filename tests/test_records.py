"""Records survive their JSONL form; seeds are the same everywhere."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from oel_ray.records import Turn, content_hash, read_jsonl, write_jsonl
from oel_ray.seeds import derive_seed

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
IDS = st.lists(st.integers(0, 2**31), max_size=5)
TURNS = st.builds(
    Turn,
    observation=TEXT,
    response=TEXT,
    prompt_ids=IDS,
    response_ids=IDS,
    action=TEXT,
    feedback=TEXT,
    weight_version=TEXT,
    finish_reason=TEXT,
)


@settings(max_examples=60)
@given(turns=st.lists(TURNS, max_size=4))
def test_records_read_from_jsonl_equal_those_written_one_a_line(
    tmp_path_factory: pytest.TempPathFactory, turns: list[Turn]
) -> None:
    path: Path = tmp_path_factory.mktemp("records") / "turns.jsonl"
    assert write_jsonl(path, turns) == len(turns)
    assert read_jsonl(path, Turn) == turns
    assert len(path.read_bytes().splitlines()) == len(turns)


def test_a_line_that_does_not_fit_its_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "turns.jsonl"
    path.write_text('{"observation": "x", "reward": 1.0}\n')
    with pytest.raises(ValidationError):
        read_jsonl(path, Turn)


def test_content_hash_ignores_the_order_of_keys() -> None:
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1}) != content_hash({"a": 1})


def test_derived_seeds_never_change_and_differ_by_where_the_parts_are_cut() -> None:
    assert derive_seed(0) == 436422930
    assert derive_seed(7, "play", 1, "r001-extraction-0003", 2) == 1108018215
    assert derive_seed(1, "a", "bc") != derive_seed(1, "ab", "c")
