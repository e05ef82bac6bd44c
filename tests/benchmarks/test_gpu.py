import pytest
import torch

from benchmarks.step_vs_trl import have_trl
from tests.benchmarks.commands import check, last_line, run

pytestmark = pytest.mark.process


def test_everything_for_a_gpu_runs_on_a_cpu_at_tiny_sizes() -> None:
    line = last_line("benchmarks.gpu", "--device", "cpu", "--tiny", "--runs", "1")
    assert line["passed"] and len(line["exactness"]) == 4
    check(line["loss_memory"], "loss_memory", ">= 10", "naive", "ours")
    check(line["loss_time"], "loss_time", "<= 1.0", "ours", "naive")
    assert line["step"]["step_s"] > 0 and line["step"]["response_tokens"] == 20
    assert have_trl() == ("step_vs_trl" in line)
    if have_trl():
        check(line["step_vs_trl"], "step_vs_trl", ">= 1.5", "trl", "ours")


def test_without_cuda_the_gpu_benchmark_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = run("benchmarks.gpu")
    assert done.returncode == 2 and "no CUDA device" in done.stderr
