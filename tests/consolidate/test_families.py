"""What consolidation needs of a family of models: its own attention, clean padding, the names of its checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from oel_ray.checkpoint import checkpoint_shapes, checkpoint_tensors
from oel_ray.consolidate.loading import load_model
from oel_ray.consolidate.reading import pad_tokens, response_hidden
from oel_ray.consolidate.weights import FullWeights, check_names
from oel_ray.errors import UserError
from tests.tiny_models import FAMILIES, tiny_model

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


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_hidden_state(family: str, tmp_path: Path) -> None:
    model_of(family).save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float32)

    def hidden(prompts: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
        batch = pad_tokens(prompts, responses, "cpu")
        return response_hidden(model, batch.tokens_BS, batch.mask_BS, batch.rows_T)

    alone = [hidden([PROMPT], [[8, 9]]), hidden([SHORT], [[10]])]
    assert torch.allclose(hidden([PROMPT, SHORT], [[8, 9], [10]]), torch.cat(alone), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_the_names_of_its_checkpoint(family: str, tied: bool, tmp_path: Path) -> None:
    model_of(family, tied=tied).save_pretrained(tmp_path)
    weights = FullWeights(load_model(tmp_path, torch.float32), torch.float32)
    check_names(weights, tmp_path)
    assert {name: tuple(shape) for name, _, shape in weights.metadata()} == checkpoint_shapes(tmp_path)
    assert ("lm_head.weight" in checkpoint_shapes(tmp_path)) != tied


def test_what_some_folders_hold_besides_is_no_difference(tmp_path: Path) -> None:
    """A tied head once more, and the rotary frequencies of old Llama folders."""
    model_of("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    expected = set(tensors)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors, file, metadata={"format": "pt"})
    weights = FullWeights(load_model(tmp_path, torch.float32), torch.float32)
    check_names(weights, tmp_path)
    assert {name for name, *_ in weights.metadata()} == expected
    assert {name for name, _ in checkpoint_tensors(tmp_path)} == set(checkpoint_shapes(tmp_path))
    assert set(checkpoint_shapes(tmp_path)) == expected | {"lm_head.weight"}


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
