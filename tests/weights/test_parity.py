"""Real vLLM engines on this machine's CPU against plain transformers: what an engine serves after a weight sync is the
policy that was sent, and the check that says so fails when a part of the sync is left out.

One engine serves all tests of a case. The tests that leave it unable to serve stand at the end.
"""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from oel_ray.config.precision import bfloat16_units
from oel_ray.errors import EngineUnavailable, RunFailed
from oel_ray.records import Sampling
from tests.support.engine_contract import keeps_the_contract
from tests.support.probed_engine import WORKER_FAULTS, ProbedEngine
from tests.support.served import InProcess, assert_gone, children, sampled_error, top_error, warm
from tests.support.tiny_engines import PROMPTS, Student, Without, engines_config, is_greedy

pytestmark = pytest.mark.vllm

FLOAT32_LIMIT, BFLOAT16_LIMIT = 1e-3, 0.05
CACHED = 256  # eight blocks of 32 tokens, of the shortest prompt
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=24)
LONG = GREEDY.model_copy(update={"max_tokens": 600})
MISSING = {
    "tied": "model.layers.1.post_attention_layernorm.weight",
    "untied": "model.layers.0.self_attn.k_proj.weight",  # the other two thirds of its fused layer come
}
SEEDED = Sampling(temperature=1.0, top_p=0.95, top_k=50, max_tokens=24)


@dataclass
class Case:
    engine: InProcess
    student: Student
    below: list[psutil.Process]
    """The processes that vLLM started."""

    def error(self, policy: Path) -> float:
        """How far the engine is from a policy, in terms of the limit that holds for its precision."""
        if self.student.dtype == "float32":
            return top_error(self.engine, policy, "float32") / FLOAT32_LIMIT
        return sampled_error(self.engine, policy, "bfloat16") / BFLOAT16_LIMIT


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    """An engine sets variables for the processes below it; here they would outlive it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, environment: None) -> Iterator[Case]:
    dtype, kind = request.param.split("-")
    student = Student(kind, dtype, tmp_path_factory.mktemp(request.param))
    before = children()
    engine = InProcess(
        ProbedEngine(0, engines_config(dtype), str(student.first), on_gpu=False, worker_extension_cls=WORKER_FAULTS)
    )
    try:
        engine.call("start")
        below = [process for process in children() if process not in before]
        yield Case(engine, student, below)
    finally:
        engine.stop()
    assert below
    assert_gone(below)


def cases(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", names, indirect=True)


ALL = cases("float32-tied", "float32-stored", "float32-untied", "bfloat16-tied")


def test_an_engine_that_cannot_start_says_why_in_a_line(tmp_path: Path, environment: None) -> None:
    policy = Student("tied", "float32", tmp_path).first
    engine = InProcess(ProbedEngine(3, engines_config("float32", max_model_len=5000), str(policy), on_gpu=False))
    try:
        with pytest.raises(RunFailed, match=r"^engine 3 did not start: .*max_model_len \(5000\).*1024.*$"):
            engine.call("start")
    finally:
        engine.stop()


@ALL
def test_the_worker_of_vllm_imports_the_same_package_as_the_test(case: Case) -> None:
    import oel_ray

    assert case.engine.call("in_worker", "package_folder") == oel_ray.__path__[0]


@ALL
def test_after_every_sync_the_engine_is_the_policy_that_was_sent(case: Case) -> None:
    sender = case.engine.sender(case.student.weights)
    assert case.error(case.student.first) < 1
    for seed, version in ((1, "r001.s0001.a0"), (2, "r001.s0002.a0")):
        policy = case.student.become(seed)
        assert warm(case.engine) >= CACHED
        before = case.error(policy)
        case.engine.send(sender, version)
        after = case.error(policy)
        print(f"error over its limit: {before:.1f} before sync {version}, {after:.4f} after it")
        assert before > 5
        assert after < 1
        assert case.engine.call("check_health") == version
        assert case.engine.call("generate", PROMPTS[0], SEEDED, 1, 60.0).weight_version == version
    sender.shutdown()


def wrong_under_load(case: Case, syncs: int, first_seed: int) -> list[str]:
    """What is wrong with responses that are asked for all the while, by the weights that each names."""
    policies, answers, stopped = {}, list[tuple[list[int], Any]](), threading.Event()

    def ask() -> None:
        while not stopped.is_set():
            asked = [(ids, case.engine.submit("generate", ids, GREEDY, 0, 60.0)) for ids in PROMPTS]
            answers.extend((ids, answer.exception(60) or answer.result()) for ids, answer in asked)

    sender = case.engine.sender(case.student.weights)
    policies["begin"] = case.student.become(first_seed)
    case.engine.send(sender, "begin")
    load = threading.Thread(target=ask)
    load.start()
    try:
        for number in range(1, syncs + 1):
            until = len(answers) + len(PROMPTS)
            while len(answers) < until:
                time.sleep(0.01)
            policies[f"sync-{number}"] = case.student.become(first_seed + number)
            case.engine.send(sender, f"sync-{number}")
    finally:
        stopped.set()
        load.join(60)
        sender.shutdown()
    wrong = [str(answer) for _, answer in answers if isinstance(answer, BaseException)]
    good = [(ids, answer) for ids, answer in answers if not isinstance(answer, BaseException)]
    good.sort(key=lambda entry: entry[1].weight_version)
    assert len({answer.weight_version for _, answer in good}) >= syncs
    return wrong + [
        f"stale {answer.weight_version}"
        for ids, answer in good
        if not is_greedy(policies[answer.weight_version], ids, answer.token_ids, FLOAT32_LIMIT)
    ]


@cases("float32-tied")
def test_in_ten_syncs_under_load_no_response_is_mixed_or_stale(case: Case) -> None:
    assert wrong_under_load(case, 10, 100) == []


@cases("float32-tied")
def test_under_load_a_sync_that_keeps_the_prefix_cache_gives_stale_responses(case: Case) -> None:
    case.engine.call("keep_stale_cache", True)
    wrong = wrong_under_load(case, 2, 200)
    case.engine.call("keep_stale_cache", False)
    case.engine.call("drop_cache")
    assert {what.split()[0] for what in wrong} == {"stale"}


@cases("float32-tied")
def test_a_sync_that_does_not_wait_for_running_requests_fails_or_gives_a_mixed_response(case: Case) -> None:
    """By the reset, which cannot be done then, and if that is left out by the response; whichever is first."""
    case.engine.call("freeze", True)
    sender = case.engine.sender(case.student.weights)
    reset = "could not reset its prefix cache"
    requests = []
    for keep, seen in ((False, reset), (True, f"{reset}|carries weight versions")):
        case.student.become(300 + keep)
        case.engine.call("keep_stale_cache", keep)
        long = case.engine.submit("generate", PROMPTS[0], LONG, 0, 60.0)
        requests.append(long)
        time.sleep(0.3)
        with pytest.raises(RuntimeError, match=seen):
            try:
                case.engine.send(sender, f"frozen-{keep}")
            except RuntimeError:
                case.engine.call("forget_failure")
                raise
            long.result(60)
    sender.shutdown()
    for request in requests:
        request.exception(60)
    case.engine.call("keep_stale_cache", False)
    case.engine.call("freeze", False)
    case.engine.call("drop_cache")


@cases("float32-tied")
def test_a_sync_without_the_completeness_check_serves_wrong_weights(case: Case) -> None:
    policy = case.student.become(400)
    case.engine.call("in_worker", "leave_out_completeness")
    sender = case.engine.sender(Without(case.student.weights, ["model.layers.0.mlp.down_proj.weight"]))
    case.engine.send(sender, "incomplete")
    assert not case.error(policy) < 5  # it may be NaN
    case.engine.call("in_worker", "check_completeness_again")
    sender.shutdown()
    case.engine.call("load_policy", str(policy), "complete")
    assert case.error(policy) < 1


@cases("float32-tied")
def test_the_vllm_engine_keeps_the_contract_of_engines(case: Case) -> None:
    keeps_the_contract(case.engine.submit, str(case.student.first), max_tokens=24)


@cases("float32-tied")
def test_a_repeated_prompt_is_reported_as_cached(case: Case) -> None:
    case.engine.call("drop_cache")
    cached = [case.engine.call("generate", PROMPTS[0], GREEDY, 0, 60.0).cached_tokens for _ in range(2)]
    assert cached[0] == 0 and CACHED <= cached[1] < len(PROMPTS[0])


@ALL
def test_loading_a_policy_folder_replaces_the_weights_and_the_prefix_cache(case: Case) -> None:
    policy = case.student.become(3)
    assert warm(case.engine) >= CACHED
    assert case.error(policy) > 5
    case.engine.call("load_policy", str(policy), "r003")
    assert case.error(policy) < 1
    assert case.engine.call("check_health") == "r003"


@cases("float32-tied", "float32-untied")
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_response_does_not_depend_on_what_else_is_asked(case: Case, sampling: Sampling) -> None:
    prompts = [ids[:length] for ids in PROMPTS for length in (40, 150, 299)][:8]
    alone = [case.engine.call("generate", ids, sampling, seed, 60.0) for seed, ids in enumerate(prompts)]
    together = [case.engine.submit("generate", ids, sampling, seed, 60.0) for seed, ids in enumerate(prompts)]
    assert [future.result(60).token_ids for future in together] == [response.token_ids for response in alone]
    assert len({tuple(response.token_ids) for response in alone}) == len(alone)


@cases("float32-tied", "float32-untied")
def test_a_prefix_cache_kept_over_a_load_gives_wrong_probabilities(case: Case) -> None:
    warm(case.engine)
    policy = case.student.become(4)
    case.engine.call("keep_stale_cache", True)
    case.engine.call("load_policy", str(policy), "stale")
    stale = case.error(policy)
    case.engine.call("keep_stale_cache", False)
    case.engine.call("drop_cache")
    print(f"error over its limit with a stale cache: {stale:.1f}")
    assert stale > 5
    assert case.error(policy) < 1


# oneDNN reorders a bfloat16 head only where the processor multiplies bfloat16.
@cases("float32-tied", *(["bfloat16-tied"] if bfloat16_units() else []))
def test_a_tied_head_that_is_not_repacked_after_a_sync_gives_wrong_probabilities(case: Case) -> None:
    policy = case.student.become(5)
    case.engine.call("in_worker", "leave_out_head_repack")
    sender = case.engine.sender(case.student.weights)
    case.engine.send(sender, "old-head")
    sender.shutdown()
    old_head = case.error(policy)
    case.engine.call("in_worker", "repack_head_again")
    print(f"error over its limit with the old head: {old_head:.1f}")
    assert old_head > 5
    assert case.error(policy) < 1


@cases("float32-tied", "float32-untied")
def test_a_sync_without_a_tensor_fails_and_the_engine_serves_no_more(case: Case) -> None:
    missing = MISSING[case.student.kind]
    case.student.become(6)
    sender = case.engine.sender(Without(case.student.weights, [missing]))
    with pytest.raises(Exception, match=missing):
        case.engine.send(sender, "incomplete")
    sender.shutdown()
    attempts: list[tuple[Any, ...]] = [
        ("generate", PROMPTS[0], GREEDY, 0, 60.0),
        ("check_health",),
        ("load_policy", str(case.student.first), "again"),
    ]
    for attempt in attempts:
        with pytest.raises(EngineUnavailable, match="engine 0 failed a weight sync"):
            case.engine.call(*attempt)


@cases("bfloat16-tied")
def test_an_engine_without_its_worker_says_so(case: Case) -> None:
    running = case.engine.submit("generate", PROMPTS[0], GREEDY.model_copy(update={"max_tokens": 700}), 0, 60.0)
    worker = max(case.below, key=lambda process: len(process.parents()))
    worker.kill()
    with pytest.raises(EngineUnavailable, match="engine 0 lost a vLLM process"):
        running.result(60)
    with pytest.raises(EngineUnavailable, match="engine 0 lost a vLLM process"):
        case.engine.call("check_health")
