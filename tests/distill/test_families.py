"""What consolidation needs of a family of models: its own attention, clean padding, the names of its checkpoint."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    Llama4TextConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from oel_ray.config.schema import LoraConfig
from oel_ray.distill.gather import FullWeights, check_names, weights_of
from oel_ray.distill.inputs import attention_of, lay_out, response_hidden
from oel_ray.distill.lora import add_adapters
from oel_ray.errors import UserError
from oel_ray.models.capabilities import can_pack, reads_packed
from oel_ray.models.folder import checkpoint_shapes, checkpoint_tensors
from oel_ray.models.load import load_model, use_flash_attention
from oel_ray.weights.export import export_policy
from tests.support.tiny_models import FAMILIES, store_head, tiny_model

PROMPT, SHORT = [(7 * i) % 120 + 3 for i in range(100)], [5, 6, 7]


def model_of(family: str, *, tied: bool = True) -> Any:
    return tiny_model(family, vocab_size=128, tied=tied, seed=0, pad_token_id=0, bos_token_id=1, eos_token_id=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_attends_as_its_family_does(family: str, tmp_path: Path) -> None:
    model_of(family).save_pretrained(tmp_path)
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        ours = load_model(tmp_path, torch.float32)(tokens).logits
        exact, torchs = (
            AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)(tokens).logits
            for name in ("eager", "sdpa")
        )
    assert torch.allclose(ours, exact, atol=1e-4)
    assert torch.allclose(torchs, exact, atol=1e-4) == (family != "gemma2"), "transformers has changed: look again"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_samples_in_the_batch_change_no_hidden_state(family: str, packed: bool, tmp_path: Path) -> None:
    model_of(family).save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float32)

    def hidden(prompts: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
        return response_hidden(model, lay_out(prompts, responses, "cpu", packed=packed))

    alone = [hidden([PROMPT], [[8, 9]]), hidden([SHORT], [[10]])]
    assert torch.allclose(hidden([PROMPT, SHORT], [[8, 9], [10]]), torch.cat(alone), atol=1e-4)
    assert torch.allclose(hidden([SHORT, PROMPT], [[10], [8, 9]]), torch.cat(alone[::-1]), atol=1e-4)
    assert can_pack(model)


SIZE: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
CANNOT_PACK = {
    "positions that are learnt": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2),
    "positions that nobody tells": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2),
    "rotations of the longest prompt": Qwen3Config(**SIZE, head_dim=16, rope_parameters=DYNAMIC),
    "chunks": Llama4TextConfig(**SIZE, head_dim=16, attention_chunk_size=8, num_local_experts=2),
    "state": Qwen3NextConfig(**SIZE, head_dim=16, num_experts=2),
}


@pytest.mark.parametrize("kind", CANNOT_PACK)
def test_a_model_that_cannot_pack_is_padded_or_refused(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CANNOT_PACK[kind])
    assert not can_pack(model)
    model.config._attn_implementation = "flash_attention_2"
    assert not reads_packed(model, "auto")
    with pytest.raises(UserError, match=r"^consolidate.packing=always: \w+ cannot keep samples apart"):
        reads_packed(model, "always")


def by_itself(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    position_ids: Tensor,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What flash attention makes of a packed row: it has no mask, and the positions tell where a sample begins."""
    assert attention_mask is None and len(position_ids) == 1
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    outputs = []
    for start, end in zip(starts, [*starts[1:], position_ids.shape[1]], strict=True):
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (back >= 0) & (back < (sliding_window or end))
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_flash_attention_is_told_where_a_packed_sample_begins(family: str) -> None:
    AttentionInterface.register("by_itself", by_itself)
    AttentionMaskInterface.register("by_itself", lambda *_, **__: None)
    model = model_of(family)
    batch = lay_out([PROMPT, SHORT, PROMPT[:60]], [[8, 9], [10], [11] * 5], "cpu", packed=True)
    read = partial(response_hidden, model, batch)
    with torch.no_grad():
        masked = read()
        with attention_of(model, "by_itself"):
            assert torch.allclose(read(), masked, atol=1e-4)
        assert torch.equal(read(), masked)


@pytest.mark.parametrize(
    ("supports", "attention", "installed", "after"),
    [
        (True, "sdpa", True, "flash_attention_2"),
        (False, "sdpa", True, "sdpa"),
        (True, "eager", True, "eager"),
        (True, "sdpa", False, "sdpa"),
    ],
)
def test_flash_attention_is_taken_where_it_can_be(
    supports: bool, attention: str, installed: bool, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager attention stands where a soft cap on the scores wants it."""
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: installed)
    config = SimpleNamespace(_attn_implementation=attention)
    model = SimpleNamespace(_supports_flash_attn=supports, config=config)
    model.set_attn_implementation = partial(setattr, config, "_attn_implementation")
    use_flash_attention(model)
    assert config._attn_implementation == after


def test_samples_are_packed_for_flash_attention_and_where_that_is_asked_for() -> None:
    model = model_of("qwen3")
    ways = {}
    for attention in ("sdpa", "flash_attention_2"):
        model.config._attn_implementation = attention
        ways[attention] = [reads_packed(model, packing) for packing in ("auto", "always", "never")]
    assert ways == {"sdpa": [False, True, False], "flash_attention_2": [True, True, False]}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_the_names_of_its_checkpoint(family: str, tied: bool, tmp_path: Path) -> None:
    model_of(family, tied=tied).save_pretrained(tmp_path)
    weights = weights_of(load_model(tmp_path, torch.float32), torch.float32, tmp_path)
    check_names(weights, tmp_path)
    assert {name: tuple(shape) for name, _, shape in weights.metadata()} == checkpoint_shapes(tmp_path)
    assert ("lm_head.weight" in checkpoint_shapes(tmp_path)) != tied


@pytest.mark.parametrize("adapters", [False, True])
def test_a_tied_head_that_a_folder_stores_is_exported_too(adapters: bool, tmp_path: Path) -> None:
    """Engines build a head of their own from it. By value it is the embedding."""
    source, target = tmp_path / "source", tmp_path / "target"
    model_of("qwen3").save_pretrained(source)
    store_head(source)
    student = load_model(source, torch.float32)
    if adapters:
        add_adapters(student, LoraConfig(rank=2), 0)
    else:
        with torch.no_grad():
            student.get_input_embeddings().weight += 1
    weights = weights_of(student, torch.float32, source)
    check_names(weights, source)
    sent = dict(weights)
    assert list(sent) == [name for name, *_ in weights.metadata()]
    assert {name: tuple(tensor.shape) for name, tensor in sent.items()} == checkpoint_shapes(source)
    assert torch.equal(sent["lm_head.weight"], sent["model.embed_tokens.weight"])
    export_policy(weights, source, target)
    written = dict(checkpoint_tensors(target))
    assert written.keys() == sent.keys() and all(torch.equal(written[name], sent[name]) for name in sent)
    assert load_model(target, torch.float32).lm_head.weight.equal(sent["lm_head.weight"])


def test_rotary_frequencies_stored_in_old_folders_are_ignored(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    expected = set(tensors)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors, file, metadata={"format": "pt"})
    weights = weights_of(load_model(tmp_path, torch.float32), torch.float32, tmp_path)
    check_names(weights, tmp_path)
    assert {name for name, *_ in weights.metadata()} == expected
    assert {name for name, _ in checkpoint_tensors(tmp_path)} == set(checkpoint_shapes(tmp_path)) == expected


@pytest.mark.parametrize(
    "config",
    [
        Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16),
        MixtralConfig(num_local_experts=4, num_experts_per_tok=2),
    ],
    ids=["qwen3-moe", "mixtral"],
)
def test_a_model_that_transformers_renames_is_refused(config: Any, tmp_path: Path) -> None:
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    for name, value in {**size, "num_attention_heads": 2, "num_key_value_heads": 1}.items():
        setattr(config, name, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    weights = FullWeights(load_model(tmp_path, torch.float32), torch.float32)
    with pytest.raises(
        UserError, match=r"For[A-Za-z]+ cannot be trained: .* \(\d+ differ; model\.layers\.0\.\S+ is one"
    ):
        check_names(weights, tmp_path)
