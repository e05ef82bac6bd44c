"""A rank runs out of memory: all ranks give the step up together, and try it again. Real DeepSpeed on two ranks."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from oel_ray.config.load import parse_config
from oel_ray.config.schema import ConsolidateConfig, LoraConfig
from oel_ray.consolidate.worker import _train_step
from oel_ray.distill.lora import add_adapters, sharing_weights
from oel_ray.distill.shortage import is_out_of_memory, memory_report
from oel_ray.errors import RunFailed
from tests.distill.test_training import launch
from tests.support.memory_worker import KINDS, PLACES, ZERO_3
from tests.support.tiny_training import tiny_samples


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder: Path = tmp_path_factory.mktemp("memory")
    return launch(2, folder, "tests.support.memory_worker")[1]


@pytest.mark.process
@pytest.mark.parametrize(
    ("kind", "place"), [*((kind, place) for kind in KINDS for place in PLACES), (ZERO_3, "teacher")], ids=str
)
def test_a_step_given_up_out_of_memory_leaves_weights_and_optimizer_unchanged(
    ranks: list[dict[Any, Any]], kind: Any, place: str
) -> None:
    for rank in ranks:
        losses, weights = rank[(*kind, "nowhere", 0)]
        (shortage, *again), after = rank[(*kind, place, 1)]
        assert shortage.startswith("rank 1 ran out of memory: parameters 0.00 GiB")
        assert again == losses
        assert all(torch.equal(tensor, weights[name]) for name, tensor in after.items())


@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_step_may_run_out_of_memory_twice_and_the_weights_stay_the_same(
    ranks: list[dict[Any, Any]], kind: Any
) -> None:
    for rank in ranks:
        seen, weights = rank[(*kind, "forward", 2)]
        assert [isinstance(entry, str) for entry in seen] == [True, True, False, False]
        assert all(torch.equal(tensor, rank[(*kind, "nowhere", 0)][1][name]) for name, tensor in weights.items())


@pytest.mark.process
def test_an_out_of_memory_error_lists_the_sizes_and_names_the_settings_to_lower(ranks: list[dict[Any, Any]]) -> None:
    said = ranks[0]["stage 3"]
    for part in (
        "out of memory",
        "teacher 0.00 GiB",
        "2 x 12 tokens of width 32",
        "5 x 128 words",
        "Lower consolidate.",
    ):
        assert part in said, said


def test_what_student_and_teacher_share_is_counted_once() -> None:
    size = {
        "vocab_size": 32_768,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "head_dim": 128,
    }
    with torch.device("meta"):
        student: Any = Qwen3ForCausalLM(Qwen3Config(**size)).bfloat16()
        other: Any = SimpleNamespace(
            model=Qwen3ForCausalLM(Qwen3Config(**size)).bfloat16(), caches=SimpleNamespace(device_size=0)
        )
    shared: Any = SimpleNamespace(model=sharing_weights(student), caches=SimpleNamespace(device_size=0))
    add_adapters(student, LoraConfig(rank=8), seed=0)
    config = ConsolidateConfig(offload_optimizer=True)
    said = [memory_report(config, student, teacher, 2, (1, 40)) for teacher in (shared, other)]
    beside, whole = (dict(re.findall(r"([a-z ]+?)(?: \(on the host\))? ([\d.]+) GiB", text)) for text in said)
    assert float(beside["parameters"]) < 0.05 < 0.5 < float(beside[" teacher"])
    assert float(whole["parameters"]) == pytest.approx(
        float(beside["parameters"]) + float(beside[" teacher"]), abs=0.02
    )
    assert " masters and optimizer (on the host) 0.0" in said[0]
    assert "the largest micro-batch is 1 x 40 tokens of width 2048" in said[0]


def test_only_allocation_errors_count_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
    )
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))


class Step:
    """Has room for so few micro-batches' worth of memory that it runs out the first few times."""

    packs = False

    def __init__(self, failures: int) -> None:
        self.failures, self.counts = failures, list[int]()
        self.shortage = "rank 1 ran out of memory: teacher 3.00 GiB"

    def step(self, share: Any) -> Any:
        self.counts.append(len(share))
        return None if len(self.counts) <= self.failures else "metrics"


def test_a_step_is_retried_once_with_half_as_large_micro_batches() -> None:
    job: Any = SimpleNamespace(config=parse_config({"consolidate": {"micro_batch_tokens": 48}}))
    samples = tiny_samples(8, seed=0)
    step: Any = Step(failures=1)
    assert _train_step(job, step, samples, 0, 1) == ("metrics", {"memory_retries": 1})
    assert step.counts[1] > step.counts[0]
    step = Step(failures=2)
    with pytest.raises(RunFailed, match=r"^rank 1 ran out of memory: teacher"):
        _train_step(job, step, samples, 0, 1)
    assert len(step.counts) == 2
