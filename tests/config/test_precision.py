"""What the precision `auto` stands for: on a processor, on a cluster, and in a run that goes on elsewhere."""

from pathlib import Path

import pytest

from oel_ray.cluster import session
from oel_ray.config import precision
from oel_ray.config.precision import Auto, auto_here, auto_on_nodes, bfloat16_units, precisions
from oel_ray.config.schema import RunConfig
from oel_ray.runs.files import read_json, write_json
from oel_ray.runs.folder import RunFolder
from tests.support import example_run

WITH = "flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n"
WITHOUT = "flags\t\t: fpu avx2 avx512f avx512_vnni\n"


def processor(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    file = folder / "cpuinfo"
    file.write_text(text)
    monkeypatch.setattr(precision, "_CPUINFO", file)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)


@pytest.mark.parametrize(
    ("text", "units", "choice"),
    [
        (WITH, ["avx512_bf16", "amx_bf16"], "bfloat16, because this processor has avx512_bf16"),
        ("flags : amx_bf16", ["amx_bf16"], "bfloat16, because this processor has amx_bf16"),
        (WITHOUT, [], "float32, because this processor has neither avx512_bf16 nor amx_bf16"),
        ("", [], "float32, because this processor has neither avx512_bf16 nor amx_bf16"),
    ],
)
def test_auto_is_bfloat16_only_on_processors_with_instructions_for_it(
    text: str, units: list[str], choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, tmp_path, text)
    assert bfloat16_units() == units
    assert str(auto_here()) == choice


@pytest.mark.parametrize(("limit", "hidden"), [("AVX2", True), ("avx512_core", True), ("AVX512_CORE_BF16", False)])
def test_instructions_that_onednn_is_forbidden_to_use_do_not_count(
    limit: str, hidden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, tmp_path, WITH)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert (bfloat16_units() == []) == hidden


def test_one_node_without_bfloat16_instructions_makes_the_whole_cluster_use_float32() -> None:
    assert auto_on_nodes([], 3).precision == "bfloat16"
    slow = auto_on_nodes(["abc"], 3)
    assert str(slow).startswith("float32, because 1 of 3 nodes have neither avx512_bf16 nor amx_bf16, e.g. abc")


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ({"a": {"CPU": 64.0, "bfloat16": 1.0}, "b": {"CPU": 64.0, "bfloat16": 1.0}}, "bfloat16"),
        ({"a": {"CPU": 64.0, "bfloat16": 1.0}, "b": {"CPU": 64.0, "bfloat16": 0.0}}, "float32"),
        ({"head": {"CPU": 0.0, "bfloat16": 0.0}, "b": {"CPU": 64.0, "bfloat16": 1.0}}, "bfloat16"),
        ({"a": {"CPU": 64.0, "GPU": 8.0, "bfloat16": 0.0}}, "bfloat16"),
    ],
    ids=["all have them", "one lacks them", "the head computes nothing", "GPUs"],
)
def test_the_precision_of_a_cluster_follows_from_what_its_nodes_report(
    nodes: dict[str, dict[str, float]], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "nodes_at", lambda _: nodes)
    config = RunConfig.model_validate({"cluster": {"address": "somewhere:6379"}})
    assert session.check_resources(config).precision == expected


def test_settling_the_precision_changes_only_settings_that_are_auto() -> None:
    config = RunConfig.model_validate({"engines": {"dtype": "bfloat16"}})
    assert list(precisions(config).values()) == ["bfloat16", "auto", "auto"]
    assert list(precisions(config.settled("float32")).values()) == ["bfloat16", "float32", "float32"]
    assert config.settled("float32").settled("bfloat16") == config.settled("float32")


def test_a_run_keeps_the_precision_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = RunConfig.model_validate(example_run.small_config().model_dump() | {"policy_dtype": "auto"})
    processor(monkeypatch, tmp_path, WITHOUT)
    run = tmp_path / "run"
    with RunFolder.create(run, given) as folder:
        assert folder.config.policy_dtype == "float32"
    assert read_json(run / "run.json")["auto"] == auto_here().model_dump()
    assert "policy_dtype: auto" in (run / "config.yaml").read_text()
    processor(monkeypatch, tmp_path, WITH)
    with RunFolder.resume(run, given) as folder:
        assert folder.config.policy_dtype == "float32"
        assert folder.auto.precision == "float32"


def test_a_run_without_a_recorded_precision_reads_as_bfloat16(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, RunConfig(), Auto(precision="float32", because="of this")):
        pass
    write_json(tmp_path / "run.json", {k: v for k, v in read_json(tmp_path / "run.json").items() if k != "auto"})
    assert set(precisions(RunFolder.open(tmp_path).config).values()) == {"bfloat16"}
