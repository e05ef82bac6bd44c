import subprocess
import sys

import pytest

from benchmarks import step_vs_trl
from benchmarks.models import HEAD, random_samples
from tests.benchmarks.commands import ROOT, check, last_line, options, run

SIZES = {"knowledge": 24, "samples": 4, "prompt": 30, "response": 6, "width": 32, "layers": 2, "vocabulary": 300}

needs_trl = pytest.mark.skipif(not step_vs_trl.have_trl(), reason="TRL is not installed")


def test_samples_are_of_one_length_and_take_texts_in_turn() -> None:
    samples = random_samples(4, 50, texts=2, knowledge=30, prompt=25, response=5)
    assert {(len(s.student_prompt_ids), len(s.teacher_prompt_ids), len(s.response_ids)) for s in samples} == {
        (25, 25 + 30, 5)
    }
    first, second, third, _ = samples
    assert first.knowledge_ids is third.knowledge_ids != second.knowledge_ids
    assert first.knowledge_ids[:HEAD] == tuple(first.student_prompt_ids[:HEAD])


@pytest.mark.process
def test_without_trl_it_says_so_in_one_line() -> None:
    done = run("benchmarks.step_vs_trl", without=("trl",))
    assert done.returncode == 2
    assert "benchmarks.step_vs_trl: TRL is not installed" in done.stderr and "Traceback" not in done.stderr


@needs_trl
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_trl_benchmark_compares_steps_with_equal_loss_and_gradient_norm(precision: str) -> None:
    line = last_line("benchmarks.step_vs_trl", *options(SIZES), "--runs", "1", "--precision", precision)
    check(line, "step_vs_trl", ">= 1.5", "trl", "ours")
    assert [point["knowledge"] for point in line["sweep"]] == [24, 96]
    assert line["trl_batch"] in {1, 4}
    for theirs, ours in (line["loss"], line["grad_norm"]):
        assert ours == pytest.approx(theirs, rel=step_vs_trl.TOLERANCE[precision]) and ours > 1e-3


UNKNOWING = """
from dataclasses import replace

from benchmarks import step_vs_trl, trl_trainer


class Unknowing(trl_trainer.TrlStudent):
    def __init__(self, student, teacher, samples, *others):
        bare = [replace(s, knowledge_ids=tuple(s.student_prompt_ids[: s.head])) for s in samples]
        super().__init__(student, teacher, bare, *others)


trl_trainer.TrlStudent = Unknowing
step_vs_trl.compare(step_vs_trl.StepCase(**SIZES), runs=1)
"""


@needs_trl
def test_the_trl_benchmark_fails_if_the_losses_differ() -> None:
    """A teacher of TRL's without the knowledge finds another loss. (In a process of its own, where the group stays.)"""
    code = UNKNOWING.replace("SIZES", repr(SIZES))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "not the same work: loss" in done.stderr
