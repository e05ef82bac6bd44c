"""Games and knowledge from elsewhere: what is filled in, and how bad lines are named."""

import json
from pathlib import Path
from typing import Any

import pytest

from oel_ray.consolidate.prefixes import prefixes
from oel_ray.errors import UserError
from oel_ray.imports.games import put_trajectories, read_trajectories
from oel_ray.imports.knowledge import ELSEWHERE, put_knowledge, read_knowledge
from oel_ray.runs.folder import RunFolder
from oel_ray.text.chat import ChatFormat
from oel_ray.views.show import remarks
from oel_ray.views.verify import verify
from tests.support import example_run
from tests.support.tokenizers_for_tests import small_tokenizer

CONFIG = example_run.small_config()
SMALLEST = {
    "instructions": "Open the lock.",
    "turns": [
        {"observation": "Locked.", "response": "<think>hm</think>I turn [left]"},
        {"observation": "Open.", "response": "[go]"},
    ],
}


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(small_tokenizer(), thinking=True)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_fields_that_a_log_leaves_out_are_filled_in(tmp_path: Path, chat: ChatFormat) -> None:
    path = write(tmp_path / "log.jsonl", SMALLEST, SMALLEST | {"id": "mine", "env": "Locks", "outcome": "Done."})
    (first, second), bad = read_trajectories(path, 2, "consolidation", CONFIG, chat)
    assert bad == []
    assert (first.id, first.round, first.split, first.env) == ("r002-c-0000", 2, "consolidation", CONFIG.env.id)
    assert [turn.feedback for turn in first.turns] == ["Open.", ""]
    assert [turn.action for turn in first.turns] == ["I turn [left]", ""], "a thought that never ends is no action"
    assert (second.id, second.env, second.outcome) == ("mine", "Locks", "Done.")
    assert first.map_hash == second.map_hash
    assert len(prefixes([first, second], chat)) == 4


def test_token_ids_and_weight_versions_in_imported_games_are_dropped(tmp_path: Path, chat: ChatFormat) -> None:
    foreign = {"observation": "o", "response": "r", "prompt_ids": [1], "response_ids": [2], "weight_version": "r009"}
    path = write(tmp_path / "log.jsonl", SMALLEST | {"turns": [foreign]})
    (game,), _ = read_trajectories(path, 1, "extraction", CONFIG, chat)
    (turn,) = game.turns
    assert (turn.prompt_ids, turn.response_ids, turn.weight_version) == ([], [], "")


def test_every_bad_line_is_named(tmp_path: Path, chat: ChatFormat) -> None:
    turn = {"observation": "a", "response": "b"}
    path = write(
        tmp_path / "log.jsonl",
        SMALLEST | {"id": "x"},
        "not json",
        {"turns": []},
        SMALLEST | {"id": "x"},
        SMALLEST | {"success": True},
        SMALLEST | {"turns": [turn | {"feedback": "c"}, turn]},
    )
    with pytest.raises(UserError) as error:
        read_trajectories(path, 1, "extraction", CONFIG, chat)
    message = str(error.value)
    assert "5 bad lines: line 2: Invalid JSON" in message
    assert "line 3: instructions: Field required" in message
    assert "line 4: id x occurs twice" in message
    assert "line 5: success: Extra inputs are not permitted" in message
    assert "line 6: the feedback of turn 0 is not what turn 1 observes" in message
    assert "\n" not in message


def test_a_few_bad_lines_of_many_are_left_out_and_kept_with_the_reasons(tmp_path: Path, chat: ChatFormat) -> None:
    bad = [SMALLEST | {"id": "a b"}, b"\xff{".decode(errors="surrogateescape")]
    path = tmp_path / "log.jsonl"
    good = json.dumps(SMALLEST)
    lines = [good] * 100 + [bad[1]] + [good] * 98 + [json.dumps(bad[0])]
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    imported = read_trajectories(path, 1, "extraction", CONFIG, chat)
    assert len(imported.trajectories) == 198
    with pytest.raises(UserError, match=r"has 2 bad lines: line 101: Invalid JSON.*allow a larger share by --max-bad"):
        read_trajectories(path, 1, "extraction", CONFIG, chat, max_bad=0.0)
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        put_trajectories(folder, 1, "extraction", imported)
        assert folder.manifest(1).stages["import_extraction"].counts == {"extraction": 198, "bad_lines": 2}
    (kept,) = folder.quarantine.iterdir()
    first, second = map(json.loads, kept.read_text().splitlines())
    assert (first["line"], first["text"]) == (101, "\\xff{")
    assert (second["line"], json.loads(second["text"])) == (200, bad[0])
    assert second["reason"].startswith("id 'a b' has characters")
    assert verify(tmp_path / "run") == []
    assert remarks(tmp_path / "run") == ["round 1: bad lines of imported games left out: 2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (SMALLEST | {"id": "../../etc"}, "has characters other than"),
        (SMALLEST | {"id": "a b"}, "has characters other than"),
        (SMALLEST | {"id": ".."}, "has characters other than"),
        (SMALLEST | {"seed": 2**70}, "Integer exceeds 64-bit range"),
        (SMALLEST | {"params": {"size": float("nan")}}, "params.size.bool: Input should be a valid"),
        (json.dumps(SMALLEST)[:-1] + ', "round": ' + "[" * 500 + "]" * 500 + "}", "recursion limit exceeded"),
        (json.dumps(SMALLEST | {"outcome": "x" * 2**24}), "is longer than 16777216 bytes"),
        (SMALLEST | {"turns": []}, "turns: List should have at least 1 item"),
        (SMALLEST | {"turns": [{"observation": "word " * 40_000, "response": "r"}]}, "fit beside a response"),
        (SMALLEST | {"turns": [{"observation": 3, "response": "r"}]}, "turns.0.observation: Input should be a valid"),
    ],
)
def test_a_bad_line_is_refused_with_its_number_and_reason(
    tmp_path: Path, chat: ChatFormat, line: Any, message: str
) -> None:
    path = write(tmp_path / "log.jsonl", line)
    with pytest.raises(UserError, match="1 bad line: line 1: ") as error:
        read_trajectories(path, 1, "consolidation", CONFIG, chat)
    assert message in str(error.value)


def test_a_byte_order_mark_is_no_part_of_a_line(tmp_path: Path, chat: ChatFormat) -> None:
    path = write(tmp_path / "log.jsonl", SMALLEST)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_trajectories(path, 1, "extraction", CONFIG, chat).trajectories) == 1


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_named(tmp_path: Path, chat: ChatFormat, text: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"log\.jsonl holds no trajectory"):
        read_trajectories(path, 1, "extraction", CONFIG, chat)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_trajectories(tmp_path / "absent", 1, "extraction", CONFIG, chat)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_trajectories(tmp_path, 1, "extraction", CONFIG, chat)


def test_knowledge_comes_from_runs_and_from_text_files(tmp_path: Path, chat: ChatFormat) -> None:
    run = example_run.build(tmp_path / "run")
    recorded = RunFolder(run).files(1).knowledge(0)
    (tmp_path / "notes.txt").write_text("H is deep water.\nWalk around it.\n")
    ours, plain = read_knowledge([recorded, tmp_path / "notes.txt"], 2, CONFIG, chat)
    assert (ours.id, ours.seed, plain.id, plain.seed) == ("r002-k00", 0, "r002-k01", 1)
    assert [item.trajectory_id for item in ours.items] == [
        item["trajectory_id"] for item in json.loads(recorded.read_bytes())["items"]
    ]
    assert [(item.text, item.trajectory_id) for item in plain.items] == [
        ("H is deep water.\nWalk around it.", ELSEWHERE)
    ]
    assert plain.tokens == chat.count(plain.text) > 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bad.json", "{}", "no knowledge file of a run: id: Field required"),
        ("long.txt", "word " * 20_000, "shorten it or raise extract.max_tokens"),
        ("empty.txt", " \n", "holds no knowledge"),
    ],
)
def test_bad_knowledge_is_refused_by_file_and_reason(
    tmp_path: Path, chat: ChatFormat, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read_knowledge([tmp_path / name], 1, CONFIG, chat)
    assert name in str(error.value) and message in str(error.value)


def test_a_run_with_imports_passes_verify_and_tampering_with_them_is_found(tmp_path: Path, chat: ChatFormat) -> None:
    path = write(tmp_path / "log.jsonl", SMALLEST, SMALLEST)
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        for split in ("extraction", "consolidation"):
            put_trajectories(folder, 1, split, read_trajectories(path, 1, split, CONFIG, chat))
        (tmp_path / "notes.md").write_text("H is deep water.")
        put_knowledge(folder, 1, read_knowledge([tmp_path / "notes.md"], 1, CONFIG, chat))
    assert verify(tmp_path / "run") == []
    assert folder.committed[1] == {"import_extraction", "import_consolidation", "import_knowledge"}
    lines = folder.files(1).trajectories("extraction")
    lines.write_bytes(lines.read_bytes().replace(b"r001-x-0001", b"r001-x-0000"))
    findings = [str(finding) for finding in verify(tmp_path / "run")]
    assert any("was changed" in finding for finding in findings)
    assert any("id r001-x-0000 was used before" in finding for finding in findings)
