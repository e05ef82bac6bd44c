"""Where models come from: the hub's cache, without a network."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from oel_ray.errors import UserError
from oel_ray.models.resolve import prefetch, resolve_model

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with two revisions, the newer of which is the main one."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--us--small"
    for revision in (OLD, NEW):
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (repository / "snapshots" / revision).mkdir(parents=True, exist_ok=True)
            (repository / "snapshots" / revision / name).touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(NEW)
    return repository / "snapshots"


def test_a_model_in_the_cache_is_told_with_the_revision_that_stays(cached: Path) -> None:
    assert resolve_model("us/small", pytest.fail) == cached / NEW
    assert resolve_model(f"us/small@{OLD}", pytest.fail) == cached / OLD
    assert prefetch("us/small", pytest.fail) == f"us/small is in {cached / NEW}; us/small@{NEW} names it for good"


def test_a_revision_that_is_not_in_the_cache_needs_the_hub(cached: Path) -> None:
    with pytest.raises(UserError, match="not in the hub's cache while HF_HUB_OFFLINE is set"):
        resolve_model(f"us/small@{'c' * 40}", pytest.fail)


def test_a_model_that_is_here_already_needs_no_hub(cached: Path) -> None:
    for model in ("micro", str(cached / NEW)):
        assert "; nothing is fetched for it" in prefetch(model, pytest.fail)
