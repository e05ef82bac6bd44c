"""The files that users bring: games from the logs of an agent, knowledge as text or from another run."""

from pathlib import Path

import pytest

from tests.compat.frozen import DATA
from tests.compat.make_runs import MODEL
from tests.compat.places import ChatFormat, KnowledgeText, RunConfig, read_knowledge, read_trajectories


@pytest.fixture(scope="module")
def chat(unpacked: Path) -> ChatFormat:
    return ChatFormat.from_pretrained(unpacked / MODEL, thinking=False)


def test_games_are_read_as_they_were(chat: ChatFormat) -> None:
    """One says as little as it may, one all that it may, one comes from a run folder; all others have one mistake."""
    read = read_trajectories(DATA / "games.jsonl", 1, "extraction", RunConfig(), chat, max_bad=0.8)
    assert b"".join(game.to_json() + b"\n" for game in read.trajectories) == (DATA / "games_read.jsonl").read_bytes()
    assert [line.line for line in read.bad] == [5, 6, 7, 8, 9, 10, 11, 12]


def test_more_bad_lines_than_allowed_are_refused(chat: ChatFormat) -> None:
    with pytest.raises(Exception, match=r"has 8 bad lines: line 5: reward: .* or allow a larger share by --max-bad"):
        read_trajectories(DATA / "games.jsonl", 1, "extraction", RunConfig(), chat)


def test_knowledge_is_read_from_a_run_and_from_plain_text(chat: ChatFormat, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Beware of H.\nG wins.\n")
    given = DATA / "records" / "KnowledgeText.json"
    ours, theirs = read_knowledge([given, tmp_path / "notes.txt"], 2, RunConfig(), chat)
    before = KnowledgeText.from_json(given.read_bytes())
    kept = ours.model_dump(include={"text", "items", "format"})
    assert kept == before.model_dump(include={"text", "items", "format"})
    assert (ours.id, ours.round, ours.seed, ours.steps) == ("r002-k00", 2, 0, [])
    assert (theirs.id, theirs.text, theirs.format) == ("r002-k01", "Beware of H.\nG wins.", "unstructured")
    assert [(item.text, item.trajectory_id) for item in theirs.items] == [(theirs.text, "elsewhere")]
