"""Measurements out of distribution: what the harness is asked for, what is read from its answer, the micro worlds."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from examples.micro_model.worlds import worlds as trained_on
from experiments import ifeval, worlds
from experiments.measure import Measured
from oel_ray.errors import UserError
from oel_ray.models.resolve import MICRO, resolve_model

# Of the shape that lm-evaluation-harness 0.4.13 returns, what is not read left out.
ANSWER = {
    "results": {
        "ifeval": {
            "alias": "ifeval",
            "prompt_level_strict_acc,none": 0.625,
            "prompt_level_strict_acc_stderr,none": 0.125,
            "inst_level_strict_acc,none": 0.75,
            "inst_level_strict_acc_stderr,none": "N/A",
        }
    },
    "n-samples": {"ifeval": {"original": 541, "effective": 16}},
    "higher_is_better": {"ifeval": {"prompt_level_strict_acc": True}},
}


def test_the_harness_samples_as_the_paper_does() -> None:
    called = ifeval.arguments(Path("policy"), "vllm", "cuda", "ifeval", 42)
    paper = {"pretrained": "policy", "enable_thinking": False, "seed": 42}
    assert called["model_args"] == paper | {"gpu_memory_utilization": 0.9}
    assert called["gen_kwargs"] == {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}
    assert called["apply_chat_template"] is True
    assert called["batch_size"] == "auto", "else vLLM gets one prompt after the other"
    assert "seed" not in ifeval.arguments(Path("policy"), "hf", "cuda", "ifeval", 42)["model_args"]


def test_the_rate_and_error_are_read_from_the_answer_of_the_harness() -> None:
    assert ifeval.measured(ANSWER, "ifeval") == Measured(rate=0.625, error=0.125, count=16)
    with pytest.raises(UserError, match="the task other gave no prompt_level_strict_acc"):
        ifeval.measured(ANSWER, "other")


def test_unseen_worlds_use_no_letters_of_the_game_and_no_pair_of_the_training() -> None:
    unseen = worlds.unseen()
    assert len(unseen) >= worlds.MAPS
    assert not {letter for world in unseen for letter in world} & {"H", "G"}
    assert not {frozenset(world) for world in unseen} & {frozenset(world) for world in trained_on("train")}


@pytest.mark.slow
def test_told_of_letters_that_it_never_saw_the_micro_model_wins() -> None:
    it = worlds.measure(resolve_model(MICRO, print), maps=16, seed=0)
    assert it.count == 16
    assert it.rate >= 0.4


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "package"), [("hf", "transformers"), ("vllm", "vllm")])
def test_the_harness_measures_a_task_of_our_own(backend: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    if not any(found.name == package for found in metadata.distributions()):
        pytest.skip(f"the harness wants a package of the name {package}, and vLLM for CPUs has another")
    out = tmp_path / "measured.json"
    task = ["--task", "stub_ifeval", "--tasks-in", str(Path(__file__).parent / "stub_task")]
    command = [sys.executable, "-m", "experiments.ifeval", str(resolve_model(MICRO, print)), "--out", str(out)]
    subprocess.run([*command, "--backend", backend, *task], check=True, timeout=300)
    it = Measured.model_validate_json(out.read_text())
    assert it.count == 8
    assert 0 < it.rate < 1, "a model that says few moves does as it is told where it is told not to"
