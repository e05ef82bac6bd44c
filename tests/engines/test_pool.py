"""The pool on a real local Ray: with engines that have no vLLM, and at the end with one that has."""

import asyncio
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import oel_ray.cluster.session  # noqa: F401 - sets what Ray reads when it is imported

import ray  # isort: skip

from oel_ray.engines.client import POOL_NAME, Pool
from oel_ray.engines.pool import engine_pool
from oel_ray.errors import EngineUnavailable, RunFailed
from oel_ray.records import Generation, Sampling
from oel_ray.weights.sync import EngineSyncClient, WeightSync
from tests.support import fake_engines as fakes
from tests.support.probed_engine import BreakableEngine
from tests.support.served import OnRay, assert_gone, children, sampled_error, warm
from tests.support.tiny_engines import Student, engines_config

pytestmark = pytest.mark.vllm

SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_tokens=90)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": environment},
    )
    yield
    below = children()
    ray.shutdown()
    assert_gone(below)


@pytest.fixture(autouse=True)
def _names_are_free() -> Iterator[None]:
    """A killed actor keeps its name for a moment."""
    yield
    end = time.monotonic() + 30
    while any(name in ray.util.list_named_actors() for name in (POOL_NAME, "engine-0", "engine-1")):
        assert time.monotonic() < end
        time.sleep(0.05)


def two_engines(
    engine: type = fakes.FakeEngine, *, policy: Path = Path("policy"), **values: Any
) -> AbstractContextManager[Pool]:
    return engine_pool(engines_config("float32", count=2, **values), policy, on_gpu=False, engine=engine)


def behave(manner: str, *engines: int) -> None:
    ray.get([ray.get_actor(f"engine-{index}").behave.remote(manner) for index in engines])


def ask(pool: Pool, keys: str) -> list[Generation | BaseException]:
    """One request for each key, all at once."""

    async def all_keys() -> list[Generation | BaseException]:
        requests = (pool.client([1] * 10, SAMPLING, seed=seed, key=key) for seed, key in enumerate(keys))
        return await asyncio.gather(*requests, return_exceptions=True)

    return asyncio.run(all_keys())


def engine_of(answer: Generation | BaseException) -> str:
    assert isinstance(answer, Generation), answer
    return answer.weight_version


def loads(pool: Pool) -> list[int]:
    loads: list[int] = ray.get(pool.actor.__ray_call__.remote(lambda pool: [r.load for r in pool._router.replicas]))
    return loads


def counts_of(pool: Pool, requests: int) -> dict[str, int]:
    """What the pool counts once it has been told of so many requests, which is done without waiting."""
    end = time.monotonic() + 5
    while (counts := pool.counts())["requests"] < requests:
        assert time.monotonic() < end, counts
        time.sleep(0.02)
    return counts


def restarts(pool: Pool) -> int:
    return pool.counts()["engine_restarts"]


def assert_no_load(pool: Pool) -> None:
    """Within a moment: leases are given back without waiting."""
    end = time.monotonic() + 5
    while loads(pool) != [0, 0]:
        assert time.monotonic() < end, loads(pool)
        time.sleep(0.02)


def test_keys_spread_evenly_over_engines_and_each_stays_on_its_own() -> None:
    with two_engines() as pool:
        first = {key: engine_of(answer) for key, answer in zip("abcd", ask(pool, "abcd"), strict=True)}
        assert sorted(first.values()) == ["engine-0", "engine-0", "engine-1", "engine-1"]
        assert_no_load(pool)
        for key in "dcba":
            assert [engine_of(answer) for answer in ask(pool, key)] == [first[key]]
        assert_no_load(pool)
        assert len(pool.engines()) == 2


def test_requests_of_a_dead_engine_go_to_the_other_until_none_is_left() -> None:
    with two_engines(max_restarts=0) as pool:
        behave("die", 0)
        assert [engine_of(answer) for answer in ask(pool, "abcd")] == ["engine-1"] * 4
        assert_no_load(pool)
        with pytest.raises(EngineUnavailable, match=r"^engines \[0\] are dead: .* engines.max_restarts=0$"):
            pool.engines()
        behave("die", 1)
        answers = ask(pool, "ab")
        assert [type(answer) for answer in answers] == [EngineUnavailable] * 2
        assert str(answers[0]).startswith("no healthy engine is left (engine 0 died more than")


def test_a_request_ends_by_its_deadline_even_if_the_engine_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("client", "pool"):  # the pool's own is for its end, which a hung engine makes late
        monkeypatch.setattr(f"oel_ray.engines.{module}.CONTROL_DEADLINE_S", 2.0)
    with two_engines(generate_deadline_s=0.5, max_restarts=0) as pool:
        behave("wait", 0)
        started = time.monotonic()
        assert [engine_of(answer) for answer in ask(pool, "ab")] == ["engine-1"] * 2
        behave("stand still", 1)
        (answer,) = ask(pool, "a")
        assert isinstance(answer, EngineUnavailable)
        assert time.monotonic() - started < 15


def test_dead_engines_are_replaced_and_serve_the_current_weights() -> None:
    """Also when none is left for a while: requests wait for the first replacement."""
    with two_engines() as pool:
        pool.deploy(Path("policy"), "r003")
        behave("die", 0, 1)
        assert [engine_of(answer) for answer in ask(pool, "abcd")] == ["r003"] * 4
        handles = pool.engines()
        assert ray.get([handle.check_health.remote() for handle in handles], timeout=30) == ["r003"] * 2
        assert restarts(pool) == 2
        assert_no_load(pool)


def test_a_hung_engine_is_ended_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oel_ray.engines.client.CONTROL_DEADLINE_S", 2.0)
    with two_engines(generate_deadline_s=0.5) as pool:
        pool.deploy(Path("policy"), "r001")
        behave("stand still", 0, 1)
        assert [engine_of(answer) for answer in ask(pool, "ab")] == ["r001"] * 2


def test_an_engine_that_stands_still_is_replaced_before_its_requests_are_late() -> None:
    with two_engines(stall_deadline_s=2.0) as pool:
        pool.deploy(Path("policy"), "r001")
        behave("stand still", 0)
        started = time.monotonic()
        assert [engine_of(answer) for answer in ask(pool, "abcd")] == ["r001"] * 4
        assert time.monotonic() - started < 15
        counts = counts_of(pool, 4)
        assert (counts["engine_restarts"], counts["requests_moved"]) == (1, 2)
        assert (counts["prompt_tokens"], counts["response_tokens"]) == (40, 4)


def test_an_engine_that_dies_between_requests_is_replaced_without_a_request() -> None:
    with two_engines(stall_deadline_s=2.0) as pool:
        ray.kill(ray.get_actor("engine-1"))
        end = time.monotonic() + 15
        while restarts(pool) == 0:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert len(ask(pool, "abcd")) == 4
        assert pool.counts()["requests_moved"] == 0


@pytest.mark.slow
def test_a_stalled_engine_of_a_trainer_gives_its_requests_up_at_once() -> None:
    with two_engines(stall_deadline_s=2.0) as pool:
        pool.deploy(Path("policy"), "r001")
        pool.engines()
        behave("stand still", 0)
        started = time.monotonic()
        assert [engine_of(answer) for answer in ask(pool, "ab")] == ["r001"] * 2
        assert time.monotonic() - started < 15
        assert restarts(pool) == 0


def test_an_engine_that_misses_the_deadline_of_a_load_is_replaced_with_the_new_policy() -> None:
    with two_engines(sync_deadline_s=1.0) as pool:
        behave("never load", 1)
        pool.deploy(Path("policy"), "r002")
        assert restarts(pool) == 1
        assert [engine_of(answer) for answer in ask(pool, "abcd")] == ["r002"] * 4


def test_a_sync_that_misses_its_deadline_replaces_only_engines_that_have_not_finished(tmp_path: Path) -> None:
    with two_engines(fakes.Recording, policy=tmp_path / "steps") as pool:
        engines = pool.engines()
        client = EngineSyncClient(engines, 1, 1.0)
        client.start_weight_update()
        behave("never update", 0)
        with pytest.raises(
            EngineUnavailable, match=r"^a weight sync took more than engines.sync_deadline_s=1 on engines 0$"
        ):
            client.update_weights({"names": ["few"]})
        again = pool.engines()
        assert restarts(pool) == 1
        assert [new == old for new, old in zip(again, engines, strict=True)] == [False, True], (
            "handles of the same actors"
        )


def test_an_engines_error_in_a_sync_is_reported_at_once_in_one_line_while_others_wait(tmp_path: Path) -> None:
    said = "^engine 1 failed a weight sync: engines: RuntimeError: incomplete weight sync: missing .'lm_head.weight'.$"
    with two_engines(fakes.Recording, policy=tmp_path / "steps") as pool:
        client, started = EngineSyncClient(pool.engines(), 1, 60.0), time.monotonic()
        behave("never update", 0)
        behave("fail update", 1)
        with pytest.raises(EngineUnavailable, match=said):
            client.update_weights({"names": ["few"]})
        assert time.monotonic() - started < 30


def test_the_pool_answers_at_once_even_if_its_engines_hang() -> None:
    with two_engines(sync_deadline_s=2.0) as pool:
        behave("wait", 0, 1)
        running = [pool.actor.lease.remote(f"lease {n}", "a", 100) for n in range(50)]
        ray.get(running, timeout=30)
        behave("never load", 0, 1)
        loading = pool.actor.deploy.remote("policy", "r002")
        for _ in range(3):
            started = time.monotonic()
            pool.counts()
            ray.get(pool.actor.lease.remote(uuid.uuid4().hex, "b", 100), timeout=30)
            assert time.monotonic() - started < 1
            assert not ray.wait([loading], timeout=0.2)[0]
        ray.get(loading, timeout=30)


def test_engines_that_fail_during_training_are_replaced_only_when_the_trainer_asks_for_all() -> None:
    with two_engines() as pool:
        pool.deploy(Path("policy"), "r001")
        pool.engines()
        behave("die", 0)
        behave("unwell", 1)  # as after a sync that failed: no request tells of it
        assert [engine_of(answer) for answer in ask(pool, "ab")] == ["r001"] * 2
        assert restarts(pool) == 0, "the replacement would serve weights that the trainer has left behind"
        handles = pool.engines()
        assert ray.get([handle.check_health.remote() for handle in handles], timeout=30) == ["r001"] * 2
        assert restarts(pool) == 2


def test_leases_of_a_dead_trainer_are_dropped_when_the_next_one_asks_for_the_engines() -> None:
    with two_engines() as pool:
        ray.get(pool.actor.lease.remote("a dead rank's", "a", 100), timeout=30)
        assert sorted(loads(pool)) == [0, 100]
        assert len(pool.engines()) == 2
        assert loads(pool) == [0, 0]


def test_deploying_replaces_dead_engines_with_ones_that_serve_the_new_policy() -> None:
    with two_engines() as pool:
        pool.engines()
        behave("die", 0)
        ask(pool, "ab")
        pool.deploy(Path("policy"), "r002")
        assert restarts(pool) == 1
        behave("die", 1)
        assert [engine_of(answer) for answer in ask(pool, "abcd")] == ["r002"] * 4


@pytest.mark.parametrize(
    ("engine", "why"),
    [(fakes.OnlyOnce, "engine 0 did not start: no memory for the cache"), (fakes.Dumb, "wrote no token")],
)
def test_a_replacement_that_does_not_serve_uses_up_the_budget(engine: type, why: str, tmp_path: Path) -> None:
    with two_engines(engine, policy=tmp_path, max_restarts=2) as pool:
        pool.deploy(tmp_path, "r000")
        behave("die", 0)
        assert [engine_of(answer) for answer in ask(pool, "ab")] == ["r000"] * 2
        with pytest.raises(EngineUnavailable, match=rf"^engines \[0\] are dead: RunFailed: {why}$"):
            pool.engines()
        assert restarts(pool) == 2


def test_an_out_of_memory_error_of_ray_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray ends processes when memory runs out; who waits for them is told so by an error of another kind."""
    with two_engines() as pool:

        def no_memory(reference: object, timeout: float) -> None:
            raise ray.exceptions.OutOfMemoryError("1 worker was killed\nMemory on the node was 23 GB")

        with monkeypatch.context() as patch:
            patch.setattr(ray, "get", no_memory)
            with pytest.raises(
                EngineUnavailable, match=r"^the engine pool died: OutOfMemoryError: 1 worker was killed$"
            ):
                pool.engines()
        assert len(pool.engines()) == 2


def test_an_error_of_the_request_itself_is_not_tried_again() -> None:
    with two_engines() as pool:
        behave("refuse", 0, 1)
        answers = ask(pool, "ab")
        assert all(isinstance(answer, ValueError) for answer in answers)
        assert "the prompt is too long" in str(answers[0])
        assert_no_load(pool)
        behave("answer", 0, 1)
        assert {engine_of(answer) for answer in ask(pool, "ab")} == {"engine-0", "engine-1"}


def test_a_cancelled_request_gives_its_lease_back_and_stops_the_engine() -> None:
    async def cancel_after(pool: Pool, delay_s: float) -> None:
        request = asyncio.create_task(pool.client([1] * 10, SAMPLING, seed=0, key="a"))
        await asyncio.sleep(delay_s)
        request.cancel()
        await asyncio.wait([request])

    with two_engines() as pool:
        behave("wait", 0, 1)
        asyncio.run(cancel_after(pool, 1.0))
        assert_no_load(pool)
        engines = pool.engines()
        end = time.monotonic() + 5
        while sum(ray.get([engine.cancelled.remote() for engine in engines])) != 1:
            assert time.monotonic() < end
        for _ in range(10):
            asyncio.run(cancel_after(pool, 0.0))  # mostly before the lease is granted
        assert_no_load(pool)
        assert len(pool.engines()) == 2


def test_a_lease_that_is_given_back_before_it_is_asked_for_is_not_granted() -> None:
    with two_engines() as pool:
        ray.get(pool.actor.release.remote("overtaken"), timeout=30)
        with pytest.raises(EngineUnavailable, match="given up"):
            ray.get(pool.actor.lease.remote("overtaken", "a", 100), timeout=30)
        assert loads(pool) == [0, 0]
        assert [engine_of(answer) for answer in ask(pool, "a")] == ["engine-0"]


@pytest.mark.parametrize(
    ("engine", "deadline_s", "message"),
    [
        (fakes.WithoutMemory, 60, "engine 1 did not start: ValueError: no memory for the cache"),
        (fakes.Breaking, 60, "engines: KeyError: 'first line\\nsecond line'"),
        (fakes.Dying, 60, "an engine died: "),
        (fakes.Endless, 1, "an engine did not finish 'start' within 1 s"),
    ],
)
def test_a_pool_that_does_not_start_says_why(engine: type, deadline_s: float, message: str) -> None:
    with pytest.raises(RunFailed) as caught, two_engines(engine, start_deadline_s=deadline_s):
        pass
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


class FewWeights:
    """Three numbers; counts how often they were asked for."""

    passes = 0

    def metadata(self) -> list[Any]:
        return [("few", torch.float32, (3,))]

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        yield "few", torch.ones(3)


def test_a_sync_reaches_every_engine_at_a_rank_of_its_own(tmp_path: Path) -> None:
    with two_engines(fakes.Recording, policy=tmp_path / "steps") as pool:
        client = EngineSyncClient(pool.engines(), 4, 20.0)
        client.version = "r001.s0001.a0"
        client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 9})
        client.start_weight_update()
        client.update_weights({"names": ["few"]})
        client.finish_weight_update()
        client.finish_weight_update("given")
    steps = (tmp_path / "steps").read_text().splitlines()
    assert [sorted(steps[at : at + 2]) for at in range(0, 10, 2)] == [
        ["0 init 1 of 9", "1 init 5 of 9"],
        ["0 start", "1 start"],
        ["0 update ['few']", "1 update ['few']"],
        ["0 finish r001.s0001.a0", "1 finish r001.s0001.a0"],
        ["0 finish given", "1 finish given"],
    ]


def test_a_rank_that_sends_no_weights_still_joins_every_gather() -> None:
    weights = FewWeights()
    sync = WeightSync([], weights, engines_config("float32"), rank=1, on_gpu=False)
    sync.send("r001.s0001.a0")
    sync.send("r001.s0002.a0")
    assert weights.passes == 2


@pytest.mark.slow
def test_a_real_engine_in_ray_serves_every_synced_policy_and_is_replaced_after_a_kill(tmp_path: Path) -> None:
    """A pool's whole life: start, answers, syncs; an engine that is killed leaves nothing behind and is replaced."""
    student = Student("untied", "bfloat16", tmp_path)
    config = engines_config("bfloat16", check_weights="all")
    with engine_pool(config, student.first, on_gpu=False, engine=BreakableEngine) as pool:
        (handle,) = pool.engines()
        engine = OnRay(handle)
        pool.deploy(student.first, "r000")
        assert [engine_of(answer) for answer in ask(pool, "ab")] == ["r000"] * 2
        sync = WeightSync([handle], student.weights, config, rank=0, on_gpu=False)
        for seed, version in ((1, "r001.s0001.a0"), (2, "r001.s0002.a0")):
            policy = student.become(seed)
            assert warm(engine) >= 256
            stale = sampled_error(engine, policy, "bfloat16")
            sync.send(version)
            error = sampled_error(engine, policy, "bfloat16")
            print(f"mean error of sampled tokens: {stale:.3f} before sync {version}, {error:.5f} after it")
            assert error < 0.05 < 0.5 < stale
            assert [engine_of(answer) for answer in ask(pool, "ab")] == [version] * 2

        assert counts_of(pool, 6)["prompt_tokens"] == 60
        with pytest.raises(Exception, match=r"does not hold what was sent: model.norm.weight differs"):
            engine.call("in_worker", "damage_next_weights")
            sync.send("r001.s0003.a0")

        pid: int = ray.get(handle.__ray_call__.remote(lambda _: os.getpid()))
        (actor,) = [process for process in children() if process.pid == pid]
        vllm = actor.children(recursive=True)
        assert len(vllm) >= 2
        actor.kill()
        (answer,) = ask(pool, "a")
        assert engine_of(answer) == "r000", "the replacement has what was deployed last"
        assert restarts(pool) == 1
        assert_gone([actor, *vllm])
