"""Real DeepSpeed and gloo in processes of their own, against a plain PyTorch loop. See `worker.py`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oel_ray.distill.batches import token_weights
from tests.support.naive_losses import divergence
from tests.support.tiny_training import tiny_model
from tests.support.training_worker import (
    BFLOAT16,
    DIVERGENCES,
    FLOAT32,
    LIVE,
    PACKED,
    STEPS,
    WITHOUT_KNOWLEDGE,
    settings,
    step_samples,
)

Runs = dict[int, tuple[Path, list[dict[Any, Any]]]]
Rounding = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folder and the results of every rank, for one rank and for two."""
    return {world_size: launch(world_size, tmp_path_factory.mktemp(f"ranks-{world_size}")) for world_size in (1, 2)}


def launch(
    world_size: int, output: Path, module: str = "tests.support.training_worker"
) -> tuple[Path, list[dict[Any, Any]]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", module, str(output / "store")]
    logs = [output / f"rank-{rank}.log" for rank in range(world_size)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(output)],
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * world_size, "\n".join(log.read_text()[-3000:] for log in logs)
    return output, [torch.load(output / f"rank-{r}.pt", weights_only=False) for r in range(world_size)]


def plain_training(
    kind: Any, *, live_teacher: bool = False, rounding: int | None = None, bits: int = 8, **objective: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of all steps and clipped gradients of the first one: no DeepSpeed, no batches, autograd throughout.

    With `rounding`, a seed, what every layer gives, and the gradient that it gets back, is `rounded`.
    """
    config = settings(0, "float32", 1)
    student = tiny_model(kind, seed=1)
    teacher = student if live_teacher else tiny_model(kind, seed=1)
    if rounding is not None:
        round_ = partial(rounded, torch.Generator().manual_seed(rounding), bits)
        for module in [*student.modules(), *(teacher.modules() if teacher is not student else [])]:
            round_what_passes(module, round_)
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.999), weight_decay=config.weight_decay)
    losses, gradients = [], {}
    for index in range(STEPS):
        samples = step_samples(index)
        loss = torch.zeros(())
        for sample, weight in zip(samples, token_weights(samples, "response"), strict=True):
            loss = loss + weight * sum_of_kl(student, teacher, sample, config.temperature, **objective)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.grad_clip)
        if index == 0:
            gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
        optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, (index + 1) / config.warmup_steps)
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients


@cache
def what_rounding_does(kind: str, *, live_teacher: bool = False) -> list[float]:
    """By how much the losses of a training in bfloat16 may be off at most, as a share, on whatever processor.

    Three times as much as the worst of six trainings in float32 that round at random to as many bits.
    """
    exact, _ = plain_training(kind, live_teacher=live_teacher)
    trials = [apart(plain_training(kind, live_teacher=live_teacher, rounding=seed)[0], exact) for seed in range(6)]
    return [3 * worst for worst in accumulate(map(max, zip(*trials, strict=True)), max)]


def apart(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]


class _Rounded(torch.autograd.Function):
    """Rounds a value on its way forward and its gradient on its way back."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, round_: Rounding) -> torch.Tensor:
        ctx.round = round_
        return round_(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return ctx.round(gradient), None


def rounded(generator: torch.Generator, bits: int, value: torch.Tensor) -> torch.Tensor:
    """One of the two nearest numbers of so many significant bits, at random. bfloat16 has eight."""
    mantissa, exponent = torch.frexp(value)
    whole = torch.floor(mantissa * 2**bits + torch.rand(value.shape, generator=generator))
    return torch.ldexp(whole / 2**bits, exponent)


def round_what_passes(module: torch.nn.Module, round_: Rounding) -> None:
    """Round what a layer gives, and the gradient that it gets back."""

    def after(_: Any, __: Any, output: Any) -> Any:
        is_hidden = isinstance(output, torch.Tensor) and output.is_floating_point()
        return _Rounded.apply(output, round_) if is_hidden else output

    module.register_forward_hook(after)


def sum_of_kl(student: Any, teacher: Any, sample: Any, temperature: float, **objective: Any) -> torch.Tensor:
    def scaled_logits(model: Any, prompt: list[int]) -> torch.Tensor:
        logits_TV: torch.Tensor = model(torch.tensor([prompt + sample.response_ids])).logits[0, len(prompt) - 1 : -1]
        return logits_TV / temperature

    student_TV = scaled_logits(student, sample.student_prompt_ids)
    with torch.no_grad():
        teacher_TV = scaled_logits(teacher, sample.teacher_prompt_ids)
    return divergence(student_TV, teacher_TV, **objective).sum()


@pytest.mark.process
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_one_rank_two_ranks_and_all_stages_train_like_plain_pytorch(runs: Runs, kind: str) -> None:
    losses, gradients = plain_training(kind)
    for _, ranks in runs.values():
        for case in (case for case in FLOAT32 if case[0] == kind):
            for result in (rank[case] for rank in ranks):
                assert [m["loss"] for m in result["metrics"]] == pytest.approx(losses, rel=1e-4), case
                assert result["gradients"].keys() == gradients.keys()
                for name, gradient in result["gradients"].items():
                    assert torch.allclose(gradient, gradients[name], rtol=1e-4, atol=1e-6), (case, name)


@pytest.mark.process
@pytest.mark.parametrize("case", DIVERGENCES, ids=str)
def test_the_configured_divergence_is_what_is_trained(runs: Runs, case: Any) -> None:
    kind, _, name = case
    objective = {"forward": True} if name == "forward" else {"top_k": 9, "tail": name == "top_k_tail"}
    losses, _ = plain_training(kind, **objective)
    for _, ranks in runs.values():
        assert all(rank[case] == pytest.approx(losses, rel=1e-4) for rank in ranks)


@pytest.mark.process
@pytest.mark.parametrize("case", LIVE, ids=str)
def test_a_live_teacher_has_the_students_weights_in_every_step(runs: Runs, case: Any) -> None:
    kind, _, precision = case
    losses, _ = plain_training(kind, live_teacher=True)
    frozen, _ = plain_training(kind)
    near = [1e-4] * STEPS if precision == "float32" else what_rounding_does(kind, live_teacher=True)
    assert any(off > 2 * limit for off, limit in zip(apart(frozen, losses), near, strict=True))
    for _, ranks in runs.values():
        for rank in ranks:
            assert all(off < limit for off, limit in zip(apart(rank["live", *case], losses), near, strict=True))


@pytest.mark.process
def test_bfloat16_follows_float32_and_is_the_same_at_every_stage(runs: Runs) -> None:
    _, ranks = runs[2]
    for kind, stage, precision in BFLOAT16:
        losses = [m["loss"] for m in ranks[0][kind, stage, precision]["metrics"]]
        off = apart(losses, [m["loss"] for m in ranks[0][kind, 2, "float32"]["metrics"]])
        near = what_rounding_does(kind)
        print(f"{kind}, stage {stage}: off by {off}, rounding at random by up to {near}")
        assert all(ours < limit for ours, limit in zip(off, near, strict=True))
        assert losses == pytest.approx([m["loss"] for m in ranks[0][kind, 3, precision]["metrics"]], rel=1e-3)


def test_the_bounds_on_bfloat16_would_catch_rounding_to_five_bits() -> None:
    """Rounding to five bits, eight times as coarse, would be seen."""
    losses, _ = plain_training("tied")
    coarse, _ = plain_training("tied", rounding=1, bits=5)
    assert any(off > limit for off, limit in zip(apart(coarse, losses), what_rounding_does("tied"), strict=True))


@pytest.mark.process
def test_metrics_agree_on_all_ranks(runs: Runs) -> None:
    _, ranks = runs[2]
    for case in FLOAT32 + BFLOAT16:
        metrics = ranks[0][case]["metrics"]
        assert metrics == ranks[1][case]["metrics"]
        assert all(m["applied"] and m["grad_norm"] > 0 and m["kl_per_token"] > 0 for m in metrics)
        assert [m["learning_rate"] for m in metrics] == pytest.approx([0.005, 0.01, 0.01, 0.01])
        sizes = [sum(len(s.response_ids) for s in step_samples(i)) for i in range(STEPS)]
        assert [m["tokens"] for m in metrics] == sizes


@pytest.mark.process
def test_a_loss_that_is_not_finite_on_one_rank_changes_no_rank(runs: Runs) -> None:
    for _, ranks in runs.values():
        for case in FLOAT32 + (BFLOAT16 if len(ranks) > 1 else []):
            untouched = tiny_model(case[0], seed=1).state_dict()
            for rank in ranks:
                assert not rank[case]["skipped"]["applied"]
                assert rank[case]["skipped"]["loss"] != rank[case]["skipped"]["loss"]
                # also under bfloat16 the masters begin as the float32 weights that were loaded
                assert all(torch.equal(tensor, untouched[name]) for name, tensor in rank[case]["start"].items())


@pytest.mark.process
def test_without_knowledge_the_loss_is_zero(runs: Runs) -> None:
    for _, ranks in runs.values():
        for case in WITHOUT_KNOWLEDGE:
            assert abs(ranks[0]["without knowledge", *case]) < 1e-6


@pytest.mark.process
@pytest.mark.parametrize("kind", [kind for kind, _ in PACKED])
def test_packed_samples_train_as_padded_ones(runs: Runs, kind: str) -> None:
    losses, _ = plain_training(kind)
    for _, ranks in runs.values():
        for rank in ranks:
            assert rank["packed", kind] == pytest.approx(losses, rel=1e-4)
            assert rank["packed without knowledge", kind] == 0.0, "the teacher reads as the student does"


@pytest.mark.process
def test_streamed_weights_have_checkpoint_names_and_are_masters_rounded_once(runs: Runs) -> None:
    folder, ranks = runs[2]
    for case in FLOAT32 + BFLOAT16:
        checkpoint = load_file(folder / f"source-{case[0]}" / "model.safetensors")
        for dtype in (torch.float32, torch.bfloat16):
            ours = ranks[0][case][dtype]
            assert [name for name, *_ in ours["metadata"]] == list(ours["weights"])
            assert {n: s for n, _, s in ours["metadata"]} == {n: t.shape for n, t in checkpoint.items()}
            masters = ranks[0][case][torch.float32]["weights"]
            for name, declared, shape in ours["metadata"]:
                tensor = ours["weights"][name]
                assert (tensor.dtype, tensor.shape) == (declared, shape) == (dtype, checkpoint[name].shape)
                assert torch.equal(tensor, masters[name].to(dtype)), (case, name)
                assert torch.equal(tensor, ranks[1][case][dtype]["weights"][name])


@pytest.mark.process
def test_partitioned_weights_equal_whole_ones(runs: Runs) -> None:
    _, ranks = runs[2]
    for kind in ("tied", "untied"):
        partitioned, whole = (ranks[0][kind, stage, "float32"][torch.float32]["weights"] for stage in (3, 0))
        assert partitioned.keys() == whole.keys()
        # AdamW turns the rounding of a gradient near zero into a step of the learning rate's size
        off = [(partitioned[name] - whole[name]).abs().max().item() for name in whole]
        assert max(off) < 1e-3


@pytest.mark.process
@pytest.mark.parametrize("case", FLOAT32 + BFLOAT16, ids=str)
def test_the_exported_folder_loads_and_holds_the_rounded_masters(runs: Runs, case: Any) -> None:
    folder, ranks = runs[2]
    target = folder / "-".join(map(str, case))
    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (case[0] == "tied")
    masters = ranks[0][case][torch.float32]["weights"]
    state = model.state_dict()
    assert all(torch.equal(state[name], master.bfloat16()) for name, master in masters.items())
    config = json.loads((target / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (target / "generation_config.json").exists()
    shards = sorted(path.name for path in target.glob("*.safetensors"))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert len(shards) > 1 and shards == sorted(set(index["weight_map"].values()))
    assert index["weight_map"].keys() == masters.keys()
