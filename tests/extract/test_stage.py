"""The Ray side of extraction, on a Ray of two CPUs."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from oel_ray.config.schema import ExtractConfig, RunConfig, SamplingConfig
from oel_ray.errors import RunFailed
from oel_ray.extract.stage import extract
from oel_ray.records import AccumulationStep
from oel_ray.runs.journal import Journal
from tests.support.scripted_extractor import HeldAtSecondStep
from tests.support.tokenizers_for_tests import small_tokenizer
from tests.support.trajectories_for_tests import make_trajectory

pytestmark = pytest.mark.ray

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


def known(folder: Path) -> list[list[AccumulationStep]]:
    return [journals(folder)(f"steps-0{seed}.jsonl", AccumulationStep).records for seed in range(4)]


def journals(folder: Path) -> Callable[[str, type[AccumulationStep]], Journal[AccumulationStep]]:
    return lambda name, kind: Journal(folder / name, kind, folder / "bad", "test")


def test_a_run_asked_to_stop_finishes_its_current_steps_and_resumes_after_them(policy: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    reports: list[int] = []

    def stop_in_the_second_step(done: int, total: int) -> None:
        reports.append(done)
        if done == 4 and reports.count(4) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        if reports.count(4) == 2:
            gate.touch()  # by now the workers know

    with pytest.raises(KeyboardInterrupt):
        extract(GAMES, 1, CONFIG, policy, HeldAtSecondStep(gate), stop_in_the_second_step, journals(tmp_path))
    assert [len(steps) for steps in known(tmp_path)] == [2] * 4
    lines = (tmp_path / "steps-03.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "steps-03.jsonl").write_bytes(lines[1])  # without its first step the second is of no use

    texts = extract(GAMES, 1, CONFIG, policy, HeldAtSecondStep(gate), lambda *_: None, journals(tmp_path))
    assert known(tmp_path) == [text.steps for text in texts]
    assert [len(text.items) for text in texts] == [3, 3, 3, 3]


def test_a_killed_worker_is_restarted_and_goes_on_after_its_last_step(policy: Path, tmp_path: Path) -> None:
    gate, killed = tmp_path / "gate", list[int]()

    def kill_in_the_second_step(done: int, total: int) -> None:
        if done == 4 and not killed:
            workers = (child for child in psutil.Process().children(recursive=True) if is_worker(child))
            killed.append(next(workers).pid)
            os.kill(killed[0], signal.SIGKILL)
            gate.touch()

    texts = extract(GAMES, 1, CONFIG, policy, HeldAtSecondStep(gate), kill_in_the_second_step, journals(tmp_path))
    assert killed
    assert known(tmp_path) == [text.steps for text in texts]
    assert texts == extract(GAMES, 1, CONFIG, policy, HeldAtSecondStep(gate), lambda *_: None)


def is_worker(process: psutil.Process) -> bool:
    return bool(re.match(r"ray::(\S+:)?ExtractionWorker\b", " ".join(process.cmdline())))


def test_a_failing_accumulation_ends_the_stage_with_one_line(policy: Path, tmp_path: Path) -> None:
    generate = HeldAtSecondStep(tmp_path / "never", failing=("r001-k02",))
    with pytest.raises(RunFailed, match=r"^extraction seed 2 failed: RuntimeError: no engine answers$"):
        extract(GAMES, 1, CONFIG, policy, generate, lambda done, total: None)


def test_a_policy_without_a_tokenizer_ends_the_stage_with_one_line(policy: Path, tmp_path: Path) -> None:
    config = RunConfig(extract=CONFIG.extract.model_copy(update={"seeds": 1}))
    with pytest.raises(RunFailed, match=r"^extraction seed 0 failed: .*$") as caught:
        extract(GAMES, 1, config, tmp_path, HeldAtSecondStep(tmp_path), lambda done, total: None)
    assert "\n" not in str(caught.value)
