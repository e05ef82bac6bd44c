"""What lies in a run folder, byte for byte: `data/records` has an example of each kind, with all fields."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from tests.compat import places
from tests.compat.frozen import DATA
from tests.compat.places import Record, RunConfig, RunFolder, SampleRow, StepRow, write_json

OPTIONAL = {
    "AccumulationStep": {"rejected"},
    "Auto": set(),
    "BadLine": set(),
    "Evaluation": {"in_context_steps", "gate"},
    "EvaluationGame": {"knowledge_step"},
    "Frame": set(),
    "Holder": set(),
    "KnowledgeText": {"withdrawn"},
    "Manifest": {"version"},
    "State": set(),
    "Trajectory": set(),
}
"""The records that have a file or a line of their own, and what older ones of them do not say."""
INDENTED = {"Auto", "Frame", "Manifest", "State"}
"""Those that a person may want to read: indented JSON, of which `Auto` and `Frame` are a part."""


def example(name: str) -> bytes:
    return (DATA / "records" / f"{name}.json").read_bytes()


def kind(name: str) -> type[Record]:
    found: type[Record] = getattr(places, name)
    return found


def test_every_example_is_of_a_record() -> None:
    assert {file.stem for file in (DATA / "records").glob("*.json")} == {*OPTIONAL, "run", "StepRow", "SampleRow"}


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_record_is_read_and_written_as_the_same_bytes(name: str, tmp_path: Path) -> None:
    record = kind(name).from_json(example(name))
    if name in INDENTED:
        write_json(tmp_path / name, record.model_dump())
        assert (tmp_path / name).read_bytes() == example(name)
    else:
        assert record.to_json() + b"\n" == example(name)


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_record_lacks_no_field_but_those_that_older_ones_lack(name: str) -> None:
    values = json.loads(example(name))
    for field in values:
        rest = {key: value for key, value in values.items() if key != field}
        if field in OPTIONAL[name]:
            read = json.loads(kind(name).from_json(json.dumps(rest)).to_json())
            assert [*read] == [*values] and read | {field: None} == values | {field: None}
        else:
            with pytest.raises(ValidationError, match=rf"{field}\n  Field required"):
                kind(name).from_json(json.dumps(rest))


def with_an_unknown_key(values: Any) -> list[Any]:
    """The same with a key that nobody knows, once for each object in it."""
    if isinstance(values, list):
        return [
            [*values[:at], new, *values[at + 1 :]] for at, old in enumerate(values) for new in with_an_unknown_key(old)
        ]
    if not isinstance(values, dict):
        return []
    inside = [values | {key: new} for key, old in values.items() for new in with_an_unknown_key(old)]
    return [values | {"nobody_knows": {}}, *inside]


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_key_that_no_record_has_is_refused(name: str) -> None:
    for values in with_an_unknown_key(json.loads(example(name))):
        with pytest.raises(ValidationError, match="nobody_knows"):
            kind(name).from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("row", "needed"),
    [
        (StepRow, {"step", "loss", "kl_per_token", "generated_by", "weight_version"}),
        (SampleRow, {*SampleRow.model_fields}),
    ],
)
def test_rows_of_a_training_step_are_read_with_whatever_else_they_say(row: type[BaseModel], needed: set[str]) -> None:
    """`verify` reads a part of them; the rest is for people and their plots."""
    values = json.loads(example(row.__name__))
    assert row.model_validate(values | {"nobody_knows": 1}).model_dump() == values | {"nobody_knows": 1}
    for field in needed:
        with pytest.raises(ValidationError, match=rf"{field}\n  Field required"):
            row.model_validate({key: value for key, value in values.items() if key != field})


def test_run_json_says_what_it_said(tmp_path: Path) -> None:
    """A change of the configuration is in it; the saved configuration, and the replaced one, are the whole one."""
    before, after = RunConfig(), RunConfig(rounds=3)
    with RunFolder.create(tmp_path / "run", before):
        pass
    with RunFolder.resume(tmp_path / "run", after, allow_change=True):
        pass
    old, new = json.loads(example("run")), json.loads((tmp_path / "run/run.json").read_bytes())
    assert [*new] == [*old] == ["version", "run_id", "created", "packages", "auto", "changes"]
    assert (new["version"], [*new["auto"]], [*new["changes"][0]]) == (1, [*old["auto"]], [*old["changes"][0]])
    assert new["changes"][0]["changes"] == old["changes"][0]["changes"] == ["rounds: 2 -> 3"]
    assert {*new["packages"]} <= {*old["packages"]}
    assert json.loads((tmp_path / "run/status.json").read_bytes())["state"] == "partial"
    saved = [(tmp_path / "run" / name).read_text() for name in ("config-0.yaml", "config.yaml")]
    assert saved == [before.to_yaml(), after.to_yaml()]


def test_a_run_of_a_newer_version_is_refused_and_one_that_knew_no_auto_is_read(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, RunConfig()):
        pass
    info = json.loads(example("run"))
    write_json(tmp_path / "run.json", {key: value for key, value in info.items() if key not in ("auto", "changes")})
    assert RunFolder.open(tmp_path).config.engines.dtype == "bfloat16"
    write_json(tmp_path / "run.json", info | {"version": 2})
    with pytest.raises(Exception, match="was written by a newer oel-ray"):
        RunFolder.open(tmp_path)


def test_keys_of_run_json_that_nobody_knows_are_kept(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, RunConfig()) as folder:
        write_json(tmp_path / "run.json", folder.info | {"nobody_knows": 1})
    with RunFolder.resume(tmp_path, RunConfig(rounds=3), allow_change=True) as folder:
        assert folder.info["nobody_knows"] == 1
