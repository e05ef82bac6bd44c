"""What a rank saves, and goes on from. Real DeepSpeed on two ranks; see `checkpoint_worker.py`."""

from pathlib import Path
from typing import Any

import pytest
import torch

from oel_ray.config.schema import LoraConfig
from oel_ray.distill.deepspeed_config import deepspeed_config
from oel_ray.distill.gather import weights_of
from oel_ray.distill.lora import add_adapters, load_adapters
from oel_ray.models.load import load_model
from tests.distill.test_training import launch
from tests.support.checkpoint_worker import ADAPTERS, CASES, OFFLOADED
from tests.support.lora_worker import ALPHA, RANK, settings

Saved = tuple[Path, list[dict[Any, Any]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return launch(2, tmp_path_factory.mktemp("saved"), "tests.support.checkpoint_worker")


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.process
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_resumed_from_a_checkpoint_equals_training_without_a_stop(saved: Saved, case: Any) -> None:
    for rank in saved[1]:
        result = rank[case]
        assert result["skipped"], "a gradient that is not finite changes nothing, nor the steps behind it"
        assert result["losses"][-1] < result["losses"][0]
        assert result["losses again"] == result["losses"][-2:]
        assert_equal(result["weights again"], result["weights"])
        assert all(map(torch.equal, *result["teacher"])), "the teacher is what the round began with"


@pytest.mark.process
@pytest.mark.parametrize("case", OFFLOADED, ids=str)
def test_an_optimizer_on_the_host_makes_the_same_steps(saved: Saved, case: Any) -> None:
    for rank in saved[1]:
        here = rank[(*case[:3], False)]["losses"]
        assert rank[case]["losses"] == pytest.approx(here, rel=1e-5 if case[2] == "float32" else 1e-2)
        assert "masters and optimizer (on the host) 0.00 GiB" in rank[case]["account"]


@pytest.mark.process
@pytest.mark.parametrize("case", ADAPTERS, ids=str)
def test_checkpoints_with_adapters_hold_no_frozen_weights(saved: Saved, case: Any) -> None:
    files = sorted((saved[0] / "-".join(map(str, case)) / "deepspeed").rglob("*.pt"))
    assert files
    for file in files:
        content = torch.load(file, weights_only=False)
        assert all(".lora_" in name for name in content.get("module") or ())
        assert not content.get("frozen_param_fragments")
    names = [name for file in files for name in torch.load(file, weights_only=False).get("module") or ()]
    assert len(names) == 2 * 7 * 2  # two factors in each of the seven linear layers of two blocks


@pytest.mark.process
@pytest.mark.parametrize("case", ADAPTERS, ids=str)
def test_adapters_alone_give_the_same_function_to_any_number_of_ranks(saved: Saved, case: Any) -> None:
    """Also in bfloat16: the weights beside them are the policy's still, and not rounded sums."""
    folder, ranks = saved
    student = load_model(folder / "source", getattr(torch, case[2]))
    add_adapters(student, LoraConfig(rank=RANK, alpha=ALPHA), seed=99)
    load_adapters(student, folder / "-".join(map(str, case)) / "weights")
    assert_equal(dict(weights_of(student, torch.float32, folder / "source")), ranks[0][case]["saved"])


def test_the_optimizer_is_offloaded_to_the_host_only_if_configured() -> None:
    config = settings(2, "bfloat16", 2)
    assert "offload_optimizer" not in deepspeed_config(config, 2, "cuda")["zero_optimization"]
    config = config.model_copy(update={"offload_optimizer": True})
    for stage in (1, 2, 3):
        zero = deepspeed_config(config.model_copy(update={"zero_stage": stage}), 2, "cuda")["zero_optimization"]
        assert zero["stage"] == stage and zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert deepspeed_config(config, 2, "cpu")["zero_optimization"]["offload_optimizer"]["pin_memory"] is False
