"""Students with adapters: what they share with the teacher, how they train, what leaves them. See `lora_worker.py`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from oel_ray.config.schema import LoraConfig
from oel_ray.distill.batches import token_weights
from oel_ray.distill.gather import check_names, weights_of
from oel_ray.distill.lora import add_adapters, layers_to_adapt, sharing_weights
from oel_ray.distill.loss import Logits, reverse_kl
from oel_ray.errors import UserError
from oel_ray.models.folder import checkpoint_shapes
from oel_ray.models.load import load_model, model_without_weights
from tests.distill.test_training import Runs, launch, sum_of_kl
from tests.support.lora_worker import ALPHA, CASES, RANK, SEED, STEPS, TOKENS, settings, step_samples
from tests.support.tiny_models import FAMILIES
from tests.support.tiny_models import tiny_model as family_model
from tests.support.tiny_training import tiny_model

ADAPTERS = LoraConfig(rank=RANK, alpha=ALPHA)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folder and the results of every rank, for one rank and for two."""
    worker = "tests.support.lora_worker"
    return {size: launch(size, tmp_path_factory.mktemp(f"ranks-{size}"), worker) for size in (1, 2)}


def every_rank(runs: Runs) -> list[tuple[Path, Any, Any]]:
    """(folder, case, what a rank saw in it)."""
    return [(folder, case, rank[case]) for folder, ranks in runs.values() for rank in ranks for case in CASES]


def plain_training(kind: str) -> list[float]:
    """Losses of a loop of peft, torch and autograd alone, with a teacher that is another model."""
    config = settings(0, "float32", 1)
    student, teacher = tiny_model(kind, seed=1), tiny_model(kind, seed=1)
    add_adapters(student, ADAPTERS, SEED)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    losses = []
    for _ in range(STEPS):
        loss = torch.zeros(())
        for sample, weight in zip(step_samples(), token_weights(step_samples(), "response"), strict=True):
            loss = loss + weight * sum_of_kl(student, teacher, sample, config.temperature)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, config.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.process
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_one_rank_and_two_train_like_plain_peft(runs: Runs, kind: str) -> None:
    losses = plain_training(kind)
    assert losses[-1] < losses[0] / 3
    for _, case, result in every_rank(runs):
        if case[0] == kind:
            assert result["losses"] == pytest.approx(losses, rel=1e-3 if case[2] == "float32" else 0.05), case


@pytest.mark.process
def test_a_step_changes_the_adapters_alone(runs: Runs) -> None:
    for _, case, result in every_rank(runs):
        assert len(result["trained"]) == 2 * 7 * 2  # two factors in each of the seven linear layers of two blocks
        assert all(".lora_A." in name or ".lora_B." in name for name in result["trained"]), case
        assert result["gradients"] == []


@pytest.mark.process
def test_student_and_teacher_are_one_set_of_weights_in_memory(runs: Runs) -> None:
    for _, case, result in every_rank(runs):
        assert result["shared"], case


@pytest.mark.process
def test_the_teacher_reads_the_same_before_and_after(runs: Runs) -> None:
    for _, case, result in every_rank(runs):
        before, after = result["teacher"]
        assert all(map(torch.equal, before, after)), case


@pytest.mark.process
def test_without_knowledge_the_first_loss_is_zero(runs: Runs) -> None:
    assert {result["without knowledge"] for *_, result in every_rank(runs)} == {0.0}


@pytest.mark.process
def test_untrained_adapters_give_the_checkpoint_back_whatever_is_computed_in(runs: Runs) -> None:
    """The folder holds float32; a bfloat16 student has only rounded values of it."""
    for folder, case, result in every_rank(runs):
        checkpoint = load_file(folder / f"source-{case[0]}" / "model.safetensors")
        assert result["start"].keys() == checkpoint.keys()
        assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in result["start"].items()), case


@pytest.mark.process
def test_merged_weights_differ_where_there_are_adapters_and_are_rounded_once(runs: Runs) -> None:
    for folder, case, result in every_rank(runs):
        checkpoint = load_file(folder / f"source-{case[0]}" / "model.safetensors")
        merged = result["weights"]
        assert [(name, tensor.dtype, tensor.shape) for name, tensor in merged.items()] == result["metadata"]
        changed = {name for name in merged if not torch.equal(merged[name], checkpoint[name])}
        assert changed == {name for name in merged if "_proj." in name}, case
        assert all(torch.equal(result["rounded"][name], merged[name].bfloat16()) for name in merged)


@pytest.mark.process
def test_all_ranks_hold_the_same_merged_weights(runs: Runs) -> None:
    (_, [alone]), (_, [first, second]) = runs[1], runs[2]
    for case in CASES:
        for name, tensor in first[case]["weights"].items():
            assert torch.equal(tensor, second[case]["weights"][name])
            if case[2] == "float32":
                assert torch.allclose(tensor, alone[case]["weights"][name], atol=5e-3), (case, name)


@pytest.mark.process
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_exported_folder_is_the_student_without_an_adapter(runs: Runs, case: Any) -> None:
    folder, ranks = runs[2]
    target = folder / "-".join(map(str, case))
    model, loading = AutoModelForCausalLM.from_pretrained(target, dtype="auto", output_loading_info=True)
    assert not any(loading.values()), loading
    assert not any("adapter" in path.name for path in target.iterdir())
    assert checkpoint_shapes(target) == checkpoint_shapes(folder / f"source-{case[0]}")
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS)).logits
    live = ranks[0][case]["logits"].float()
    error = (logits - live).abs().max()
    assert error < (1e-4 if case[2] == "float32" else 0.05 * live.abs().max())


def gpt2() -> Any:
    """Linear layers that keep their weights the other way round."""
    torch.manual_seed(1)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    return model.eval()


@pytest.mark.parametrize("build", [lambda: tiny_model("tied", 1), lambda: tiny_model("untied", 1), gpt2])
def test_merged_weights_are_those_that_peft_merges(build: Any, tmp_path: Path) -> None:
    student = build()
    student.save_pretrained(tmp_path)
    add_adapters(student, ADAPTERS, SEED)
    randomise(student)
    reference = build()
    layers = layers_to_adapt(reference, ADAPTERS)
    reference = get_peft_model(reference, PeftConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers))
    values = {f"base_model.model.{name}": tensor for name, tensor in student.state_dict().items()}
    reference.load_state_dict(values)
    expected = reference.merge_and_unload().state_dict()
    merged = dict(weights_of(student, torch.float32, tmp_path))
    assert merged.keys() == checkpoint_shapes(tmp_path).keys()
    for name, tensor in merged.items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-6), name


def randomise(student: Any) -> None:
    """As if the adapters had been trained."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.normal_()


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_adapters_and_its_teacher_has_none(family: str, tied: bool, tmp_path: Path) -> None:
    family_model(family, vocab_size=128, tied=tied, seed=0, pad_token_id=0).save_pretrained(tmp_path)
    student = load_model(tmp_path, torch.bfloat16)
    teacher = sharing_weights(student)
    add_adapters(student, ADAPTERS, SEED)
    tokens = torch.tensor(TOKENS)

    def hidden(model: Any) -> torch.Tensor:
        states: torch.Tensor = model.base_model(input_ids=tokens).last_hidden_state
        return states

    for parameter in student.parameters():  # as DeepSpeed does it
        parameter.data = parameter.data.bfloat16()
    alone = hidden(load_model(tmp_path, torch.bfloat16))
    assert torch.equal(hidden(student), alone), "an untrained adapter is nothing at all"
    randomise(student)
    assert torch.equal(hidden(teacher), alone)
    assert not torch.equal(hidden(student), alone)
    frozen = {p.data_ptr() for p in student.parameters() if not p.requires_grad}
    assert frozen == {p.data_ptr() for p in teacher.parameters()}
    weights = weights_of(student, torch.bfloat16, tmp_path)
    check_names(weights, tmp_path)
    assert {name: tuple(shape) for name, _, shape in weights.metadata()} == checkpoint_shapes(tmp_path)


def test_adapters_begin_as_the_seed_says_and_draw_nothing_from_others() -> None:
    factors = []
    for seed in (SEED, SEED, SEED + 1):
        model = tiny_model("tied", 1)
        torch.manual_seed(len(factors))
        expected = torch.rand(3)
        torch.manual_seed(len(factors))
        add_adapters(model, ADAPTERS, seed)
        assert torch.equal(torch.rand(3), expected)
        factors.append([p.detach() for n, p in model.named_parameters() if ".lora_A." in n])
    first, again, other = factors
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_adapters_go_where_they_are_told_and_never_to_the_head(tmp_path: Path) -> None:
    tiny_model("untied", 1).save_pretrained(tmp_path)
    model = model_without_weights(tmp_path)
    everywhere = layers_to_adapt(model, ADAPTERS)
    assert len(everywhere) == 14 and "lm_head" not in everywhere
    some = LoraConfig(target_modules=("q_proj", "layers.1.mlp.up_proj"))
    assert layers_to_adapt(model, some) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    for name in ("proj", "lm_head", "embed_tokens", "norm"):
        with pytest.raises(UserError, match=f"no linear layer '{name}' before its output head: choose from down_proj"):
            layers_to_adapt(model, LoraConfig(target_modules=("q_proj", name)))


def test_a_frozen_head_gets_no_gradient_and_stores_no_tensor_for_one() -> None:
    hidden_TD, head_VD = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    student, teacher = Logits(hidden_TD, head_VD), Logits(torch.randn(3, 4), head_VD)
    loss, _ = reverse_kl(student, teacher, torch.ones(3), temperature=1.0, chunk_tokens=2)
    assert [tensor is None for tensor in loss.grad_fn.saved_tensors] == [False, True, True]  # type: ignore[union-attr]
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden_TD.grad is not None and hidden_TD.grad.any()
    assert head_VD.grad is None
