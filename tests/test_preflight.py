"""What preflight lets pass; what it refuses is a row in `test_mistakes`."""

import json
import sys
from pathlib import Path

import pytest

from oel_ray import preflight
from oel_ray.cluster import session
from oel_ray.config.load import parse_config
from oel_ray.config.schema import RunConfig
from oel_ray.errors import UserError
from oel_ray.models import policy
from oel_ray.models.resolve import resolve_model
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.stage import Stage
from tests.support import example_run
from tests.support.tokenizers_for_tests import small_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").touch()
    write_config(folder)
    return folder


def write_config(folder: Path, **changes: object) -> None:
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(values | changes))


def config(model: Path, **changes: object) -> RunConfig:
    values = {
        "model": str(model),
        "engines": {"device": "cpu", "max_model_len": 8192},
        "extract": {"max_tokens": 512, "sampling": {"max_tokens": 512}},
        "consolidate": {"workers": 1},
        "evaluate": {"maps": 3},
    }
    return parse_config(values | changes)


def test_a_sound_configuration_gives_the_models_folder(model: Path) -> None:
    assert preflight.preflight(config(model), pytest.fail).model.folder == model


@pytest.mark.parametrize("layers", ["all-linear", ["q_proj", "v_proj"]])
def test_adapters_need_peft_and_layers_that_are_there(
    model: Path, layers: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_adapters = config(model, consolidate={"workers": 1, "lora": {"target_modules": layers}})
    preflight.preflight(with_adapters, pytest.fail)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"needs the package peft, .*: install oel-ray with the extra 'lora', or set"):
        preflight.preflight(with_adapters, pytest.fail)
    preflight.preflight(config(model), pytest.fail)


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({}, 8192),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 16384),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "rope_theta": 1e4, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 4096}}, 8192),
        ({"model_type": "bloom", "architectures": ["BloomForCausalLM"], "max_position_embeddings": None}, None),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "max_position_embeddings": 1024}, 1024),
        ({"architectures": None}, 8192),
    ],
)  # fmt: skip
def test_the_context_follows_from_the_models_configuration(
    model: Path, changes: dict[str, object], context: int | None
) -> None:
    write_config(model, **changes)
    try:
        assert policy.check_model(config(model), pytest.fail).context == context
    finally:
        write_config(model)


def test_a_model_that_cannot_read_packed_samples_is_found(model: Path) -> None:
    packed = config(model, consolidate={"workers": 1, "packing": "always"})
    preflight.preflight(packed, pytest.fail)
    write_config(model, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    try:
        with pytest.raises(UserError, match=r"^consolidate.packing=always: .*: set consolidate.packing=auto$"):
            preflight.preflight(packed, pytest.fail)
    finally:
        write_config(model)


def test_a_run_first_prints_its_placement_and_the_memory_of_engines_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "alive_nodes", lambda: {"a": {"CPU": 0.0}, "b": {"CPU": 4.0, "memory": 8.0 * 2**30}})
    said: list[str] = []
    preflight.report_outlook(
        config(resolve_model("micro", print)), resolve_model("micro", print), said.append, on_gpu=False
    )
    where, engine, rank = said
    assert where == "nodes: 1 x (0 CPU) for nothing; 1 x (4 CPU) for 1 engines, 2 players, 1 trainer, 1 extractors"
    assert engine.startswith("an engine's process (8.00 GiB): weights 0.00 GiB, caches 1.00 GiB for ")
    assert "its kept texts at most 8.00 GiB" in rank and "tight, lower consolidate.teacher_cache_gib" in rank


def test_a_resumed_run_needs_the_policy_that_it_goes_on_with(model: Path, tmp_path: Path) -> None:
    asked = []

    def check(settings: RunConfig, note: object, *, plays: bool) -> None:
        asked.append(settings.model)
        assert plays

    with pytest.MonkeyPatch.context() as patch, RunFolder.create(tmp_path, config(model, rounds=1)) as folder:
        patch.setattr(preflight, "preflight", check)
        preflight.preflight_resumed(folder, print)
        example_run.prepare(Stage(folder, 0, "prepare"), Path("/recorded"))
        preflight.preflight_resumed(folder, print)
        for number, name in [(0, "evaluate"), (1, "collect"), (1, "extract"), (1, "evaluate_in_context")]:
            example_run.STAGES[name](Stage(folder, number, name))
        preflight.preflight_resumed(folder, print)
        for name in ("consolidate", "evaluate"):
            example_run.STAGES[name](Stage(folder, 1, name))
        preflight.preflight_resumed(folder, print)
    assert asked == [str(model), "/recorded", "/recorded"]


def test_the_demand_of_a_run_is_checked_against_the_cluster_that_it_joins(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = {"cpus:1": {"a": {"CPU": 64.0}}, "gpus:1": {"a": {"CPU": 32.0, "GPU": 4.0}, "b": {"CPU": 32.0, "GPU": 4.0}}}
    monkeypatch.setattr(session, "nodes_at", nodes.__getitem__)
    monkeypatch.setattr(session, "_check_cores", lambda config: pytest.fail("this machine does not matter"))
    monkeypatch.setenv("RAY_ADDRESS", "gpus:1")
    many = config(model, engines={"count": 5, "device": "auto"}, consolidate={"workers": 4})
    short = (
        r"^the run needs 9 GPUs and the cluster at gpus:1 has 8: add 1, or lower .*; demand: engines 5 x "
        r"\(1 CPU \+ 1 GPU\), players .*; supply: 1 x \(32 CPU \+ 4 GPU\) for 4 engines.*1 x \(32 CPU"
    )
    with pytest.raises(UserError, match=short):
        session.check_resources(many)
    wide = config(model, engines={"tensor_parallel": 6, "device": "auto"})
    with pytest.raises(UserError, match=r"has enough in all, but no node with room left for 1 engines: take larger"):
        session.check_resources(wide)
    monkeypatch.setenv("RAY_ADDRESS", "cpus:1")
    session.check_resources(many)
