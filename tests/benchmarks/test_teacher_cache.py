from pathlib import Path

import pytest
import torch

from benchmarks.models import qwen3_like, random_model, random_samples
from oel_ray.distill.teacher import Teacher
from tests.benchmarks.commands import check, last_line, options

SIZES = {"samples": 4, "knowledge": 256, "prompt": 30, "response": 10, "width": 64, "layers": 2, "vocabulary": 100}


def test_kept_and_reread_texts_give_the_same_hidden_states() -> None:
    teacher = Teacher(random_model(qwen3_like(64, 2, 100)).eval(), device_bytes=2**40, host_bytes=0)
    samples = random_samples(3, 100, texts=2, knowledge=40, prompt=30, response=10)
    for sample, kept in zip(samples, teacher.hidden(samples), strict=True):
        assert torch.allclose(kept, teacher.reread([sample])[0], atol=1e-4)
    assert teacher.caches.counts.builds == 2


@pytest.mark.slow
def test_the_teacher_cache_benchmark_sweeps_the_knowledge_length_and_draws_a_figure(tmp_path: Path) -> None:
    line = last_line("benchmarks.teacher_cache", *options(SIZES), "--sweep", "--out", str(tmp_path))
    check(line, "teacher_cache", ">= 10", "reread", "kept")
    assert {point["knowledge"] for point in line["sweep"]} == {16, 32, 64, 128, 256}
    assert "build_s" in line and (tmp_path / "teacher_cache.svg").exists()
