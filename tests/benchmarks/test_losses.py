from pathlib import Path

import pytest
import torch

from benchmarks.losses import LossCase, loss_with_backward
from tests.benchmarks.commands import check, last_line

SMALL = ["--tokens", "64", "--vocabulary", "4000", "--width", "16", "--chunk-tokens", "8", "--runs", "2"]


@pytest.mark.parametrize("forward", [False, True])
def test_our_loss_and_the_naive_one_give_the_same_gradients(forward: bool) -> None:
    case = LossCase(50, 300, 12, 8, forward)
    gradients = []
    for way in ("ours", "naive"):
        inputs = case.inputs()
        loss_with_backward(way, case, inputs)()  # type: ignore[arg-type]
        gradients.append([x.grad for x in inputs[:2]])
        assert inputs[2].grad is None and inputs[3].grad is None
    for ours, naive in zip(*gradients, strict=True):
        assert ours is not None and naive is not None and ours.any()
        assert torch.allclose(ours, naive, rtol=1e-3, atol=1e-6)


@pytest.mark.process
def test_the_memory_benchmark_finds_the_chunked_loss_smaller_than_the_naive_one() -> None:
    line = last_line("benchmarks.loss_memory", *SMALL, "--vocabulary", "100000")
    check(line, "loss_memory", ">= 10", "naive", "ours")
    assert line["runs"] == 2 and line["ratio"] > 3
    assert line["naive"] * 2**30 == pytest.approx(5 * 64 * 100_000 * 4, rel=0.25)


@pytest.mark.slow
def test_the_time_benchmark_writes_a_sweep_a_figure_and_a_table(tmp_path: Path) -> None:
    line = last_line("benchmarks.loss_time", *SMALL, "--forward", "--sweep", "--out", str(tmp_path / "plots"))
    check(line, "loss_time", "<= 1.0", "ours", "naive")
    assert len(line["sweep"]) == 10 and {point["tokens"] for point in line["sweep"]} == {8, 16, 32, 64}
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {"loss_time.svg", "loss_time.md"}
    svg = (tmp_path / "plots/loss_time.svg").read_text()
    assert "<svg" in svg and "<dc:date>" not in svg
    table = [row.strip("| \n").split(" | ") for row in (tmp_path / "plots/loss_time.md").read_text().splitlines()]
    assert table[0] == ["tokens", "vocabulary", "width", "ours (s)", "naive (s)", "ratio", "of pairs"]
    assert len(table) == 2 + 10 and table[2][:3] == ["64", "4,000", "16"]
    assert float(table[2][5]) == pytest.approx(line["ratio"], abs=0.01)
