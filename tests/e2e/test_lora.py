"""The whole loop with a student that has adapters: a policy like any other comes out of it."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from oel_ray.models.folder import checkpoint_shapes
from oel_ray.runs.layout import RoundFiles
from tests.e2e.test_families import assert_wrote
from tests.e2e.test_run import SMALL, oel
from tests.support.tiny_models import save_tiny_model


@pytest.mark.slow
def test_adapters_are_merged_into_the_policy_that_plays_on(tmp_path: Path) -> None:
    model, folder = save_tiny_model(tmp_path / "model"), tmp_path / "run"
    settings = ["consolidate.lora={rank: 4, alpha: 16}", "consolidate.learning_rate=1e-2"]
    finished = oel("run", "exact", f"model={model}", *SMALL, *settings, "--run-dir", str(folder))
    assert finished.returncode == 0, finished.stderr
    verified = oel("verify", str(folder), "--replay")
    assert verified.returncode == 0, verified.stdout

    files = RoundFiles(folder / "rounds/001")
    steps = [json.loads(line) for line in files.consolidation_metrics.read_text().splitlines()]
    assert all(step["applied"] and step["kl_per_token"] > 1e-4 for step in steps)
    assert checkpoint_shapes(files.policy) == checkpoint_shapes(model)
    after, loading = AutoModelForCausalLM.from_pretrained(files.policy, dtype="auto", output_loading_info=True)
    assert not any(loading.values()), loading
    before = AutoModelForCausalLM.from_pretrained(model, dtype="auto").state_dict()
    changed = {name for name, tensor in after.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {name for name in before if "_proj." in name}
    assert_wrote(files.policy, files.evaluation_games)
