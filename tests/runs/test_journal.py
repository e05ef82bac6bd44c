"""What is left of a journal after a kill, a power failure or a full disk, and what becomes of the rest."""

import json
from pathlib import Path

import pytest

from oel_ray.errors import RunFailed
from oel_ray.records import AccumulationStep
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.journal import Journal
from oel_ray.views.verify import verify
from tests.support import example_run

STEPS = example_run.knowledge_text(1, 0).steps


def journal(folder: Path) -> Journal[AccumulationStep]:
    return Journal(folder / "steps.jsonl", AccumulationStep, folder / "quarantine" / "steps.jsonl", "test")


def test_a_record_is_there_once_it_is_appended(tmp_path: Path) -> None:
    writer = journal(tmp_path)
    for number, step in enumerate(STEPS, start=1):
        writer.append(step)
        assert journal(tmp_path).records == STEPS[:number]
    assert writer.records == STEPS
    writer.cut(1)
    assert journal(tmp_path).records == STEPS[:1]
    assert not (tmp_path / "quarantine").exists()


def test_a_journal_cut_off_at_any_byte_goes_on_after_its_last_whole_record(tmp_path: Path) -> None:
    lines = [step.to_json() + b"\n" for step in STEPS]
    whole = b"".join(lines)
    for length in range(len(whole) + 1):
        (tmp_path / "steps.jsonl").write_bytes(whole[:length])
        expected = STEPS[: (length > len(lines[0]) - 2) + (length > len(whole) - 2)]
        torn = journal(tmp_path)
        assert torn.records == expected, length
        torn.append(STEPS[0])
        assert journal(tmp_path).records == [*expected, STEPS[0]]


@pytest.mark.parametrize(
    "bad", [b"\0\0\0\0", b"\xff\xfe", b"null", b"[]", b'{"index": 0}', b"[" * 100_000, b'{"index": NaN}', b"text"]
)
def test_lines_that_are_no_record_are_put_aside_with_number_and_reason(tmp_path: Path, bad: bytes) -> None:
    good = [step.to_json() for step in STEPS]
    (tmp_path / "steps.jsonl").write_bytes(b"\n".join([good[0], bad, good[1], b""]))
    mended = journal(tmp_path)
    assert mended.records == STEPS
    (row,) = map(json.loads, (tmp_path / "quarantine/steps.jsonl").read_text().splitlines())
    assert (row["line"], row["text"]) == (2, bad.decode(errors="backslashreplace"))
    assert row["reason"]
    assert (tmp_path / "steps.jsonl").read_bytes() == b"\n".join([*good, b""])
    assert not journal(tmp_path).damaged


def test_what_was_put_aside_stays_when_the_file_is_damaged_again(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_bytes(b"first\n" + STEPS[0].to_json() + b"\n")
    mended = journal(tmp_path)
    path.write_bytes(path.read_bytes() + b"second")
    assert mended.read_again().records == STEPS[:1]
    rows = map(json.loads, (tmp_path / "quarantine/steps.jsonl").read_text().splitlines())
    assert [row["text"] for row in rows] == ["first", "second"]


def test_a_full_disk_is_named_and_the_rest_goes_on_after_it(tmp_path: Path) -> None:
    writer = journal(tmp_path)
    writer.append(STEPS[0])
    kept = (tmp_path / "steps.jsonl").rename(tmp_path / "kept")
    (tmp_path / "steps.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunFailed, match=r"^cannot write to .*steps\.jsonl: No space left on device, \d+ bytes are fr"):
        writer.append(STEPS[1])
    kept.rename(tmp_path / "steps.jsonl")
    assert writer.records == journal(tmp_path).records == STEPS[:1]
    journal(tmp_path).append(STEPS[1])
    assert journal(tmp_path).records == STEPS


def test_a_cut_off_line_of_metrics_is_removed_on_resume(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, example_run.small_config()) as folder:
        folder.log_metrics({"round": 1, "kl": 0.5, "more": {"a": [1]}})
        (tmp_path / "metrics.jsonl").open("ab").write(b'{"round": 2, "k')
    with RunFolder.resume(tmp_path, None) as folder:
        folder.log_metrics({"round": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"round":1,"kl":0.5,"more":{"a":[1]}}\n{"round":2}\n'
    assert verify(tmp_path) == []


def test_a_run_on_a_full_disk_ends_with_its_folder_and_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with (
        pytest.raises(RunFailed, match=rf"^the disk is full: \d+ bytes are free in {path}$"),
        RunFolder.create(path, example_run.small_config()) as folder,
    ):
        (path / "metrics.jsonl").symlink_to("/dev/full")
        (path / ".status.json.tmp").symlink_to("/dev/full")
        folder.log_metrics({"kl": 0.5})
    assert not (path / "lock.json").exists()
    for name in ("metrics.jsonl", ".status.json.tmp"):
        (path / name).unlink()
    with RunFolder.resume(path, None) as folder:
        folder.log_metrics({"kl": 0.5})
