"""Every family of models on a real vLLM engine: what it serves after a weight sync is the policy that was sent."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from oel_ray.records import Sampling
from tests.support.probed_engine import ProbedEngine
from tests.support.served import InProcess, top_error, warm
from tests.support.tiny_engines import PROMPTS, Student, engines_config

pytestmark = pytest.mark.vllm

LIMIT = 1e-3
OTHERS = [
    "qwen3-tied",
    "qwen3-untied",
    "llama-tied",
    "llama-untied",
    "smollm3-tied",
    "smollm3-untied",
    "gemma-tied",
    "gemma3-tied",
    "gemma3-untied",
    "qwen3-stored",
    "gemma3-stored",
    "micro-tied",
    "micro-stored",
    "micro-untied",
]
# Soft caps, sliding windows, scaled embeddings and a head that vLLM has no layer for: the one that asks most.
KINDS = ["gemma2-tied", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """An engine sets variables for the processes below it; here they would outlive it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_sync_or_a_load_the_engine_is_the_new_policy(kind: str, tmp_path: Path) -> None:
    student = Student(kind, "float32", tmp_path)
    engine = InProcess(ProbedEngine(0, engines_config("float32"), str(student.first), on_gpu=False))
    try:
        engine.call("start")
        sender = engine.sender(student.weights)
        errors = [top_error(engine, student.first, "float32")]
        for seed in (1, 2):
            policy = student.become(seed)
            warm(engine)
            errors.append(top_error(engine, policy, "float32"))
            if seed == 1:
                engine.send(sender, f"r00{seed}")
            else:
                engine.call("load_policy", str(policy), f"r00{seed}")
            errors.append(top_error(engine, policy, "float32"))
        sender.shutdown()
        print("errors: first policy, before and after a sync, before and after a load:", *(f"{e:.2g}" for e in errors))
        served, before_sync, after_sync, before_load, after_load = errors
        assert max(served, after_sync, after_load) < LIMIT
        assert min(before_sync, before_load) > 5 * LIMIT
        sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=64)
        generation = engine.call("generate", PROMPTS[0], sampling, 1, 60.0)
        assert generation.weight_version == "r002"
    finally:
        engine.stop()
