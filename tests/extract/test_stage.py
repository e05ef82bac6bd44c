"""The Ray side of extraction, on a Ray of two CPUs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from oel_ray.config import ExtractConfig, RunConfig, SamplingConfig
from oel_ray.errors import RunFailed
from oel_ray.extract.stage import extract
from tests.extract.fakes import HeldAtSecondStep
from tests.tokenizers_for_tests import small_tokenizer
from tests.trajectories_for_tests import make_trajectory

GAMES = [make_trajectory(f"game-{number}") for number in range(3)]
CONFIG = RunConfig(extract=ExtractConfig(seeds=4, workers=2, max_tokens=512, sampling=SamplingConfig(max_tokens=64)))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("policy")
    small_tokenizer().save_pretrained(folder)
    ray.init(num_cpus=2, include_dashboard=False)
    yield folder
    ray.shutdown()


def test_the_stage_shows_progress_and_returns_texts_by_seed(policy: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    reports: list[tuple[int, int]] = []

    def on_progress(done: int, total: int) -> None:
        reports.append((done, total))
        if done == 4:  # every accumulation is past its first step and waits within its second
            gate.touch()

    texts = extract(GAMES, 1, CONFIG, policy, HeldAtSecondStep(gate), on_progress)
    assert [text.id for text in texts] == ["r001-k00", "r001-k01", "r001-k02", "r001-k03"]
    assert [len(text.items) for text in texts] == [3, 3, 3, 3]
    assert (4, 12) in reports
    assert reports == sorted(reports)
    assert reports[-1] == (12, 12)


def test_a_failing_accumulation_ends_the_stage_with_one_line(policy: Path, tmp_path: Path) -> None:
    generate = HeldAtSecondStep(tmp_path / "never", failing=("r001-k02",))
    with pytest.raises(RunFailed, match=r"^extraction seed 2 failed: RuntimeError: no engine answers$"):
        extract(GAMES, 1, CONFIG, policy, generate, lambda done, total: None)


def test_a_policy_without_a_tokenizer_ends_the_stage_with_one_line(policy: Path, tmp_path: Path) -> None:
    config = RunConfig(extract=CONFIG.extract.model_copy(update={"seeds": 1}))
    with pytest.raises(RunFailed, match=r"^extraction seed 0 failed: .*$") as caught:
        extract(GAMES, 1, config, tmp_path, HeldAtSecondStep(tmp_path), lambda done, total: None)
    assert "\n" not in str(caught.value)
