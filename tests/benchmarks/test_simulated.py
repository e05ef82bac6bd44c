"""The simulated engine: its time and its cache by themselves, its manners, and the way through the real pool."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.simulated import ContinuousBatch, Counts, PrefixCache, Reply, Request, Simulation, simulated
from oel_ray.errors import RunFailed
from oel_ray.records import Sampling
from tests.support.engine_contract import keeps_the_contract
from tests.support.tiny_engines import engines_config


def reply(tokens: int) -> Reply:
    return Reply(f"{tokens} tokens", tuple(range(1000, 1000 + tokens)))


def simulation(**values: Any) -> Simulation:
    """A step takes 1 s, a running response adds 0.1 s to it, a second reads 100 tokens."""
    pace: dict[str, Any] = {"decode_step_s": 1.0, "decode_sequence_s": 0.1, "prefill_tokens_per_s": 100.0}
    return Simulation(**{"replies": (reply(3),), "block_size": 4, **pace, **values})


def ends(batch: ContinuousBatch, arrivals: list[tuple[float, Request]]) -> dict[int, float]:
    """When each request is complete, by its place in the list; the clock jumps from event to event."""
    times: dict[int, float] = {}
    requests = [request for _, request in arrivals]
    waiting = list(arrivals)
    while waiting or batch.next_at is not None:
        now = min([at for at, _ in waiting[:1]] + [batch.next_at] * (batch.next_at is not None))
        for request in batch.advance(now):
            times[requests.index(request)] = now
        while waiting and waiting[0][0] == now:
            batch.add(waiting.pop(0)[1], now)
    return times


def test_a_response_takes_its_prompt_and_its_steps() -> None:
    batch = ContinuousBatch(simulation(), slots=8)
    assert ends(batch, [(5.0, Request(range(50), reply(3)))]) == {0: pytest.approx(5.0 + 0.5 + 3 * 1.1)}
    assert batch.counts == Counts(1, 50, 0, 3)


def test_a_fuller_batch_is_slower_for_each_and_faster_for_all() -> None:
    last: dict[int, float] = {}
    for count in (1, 4, 16):
        arrivals = [(0.0, Request([index], reply(10))) for index in range(count)]
        last[count] = max(ends(ContinuousBatch(simulation(), slots=16), arrivals).values())
    assert last[1] < last[4] < last[16]
    assert 1 / last[1] < 4 / last[4] < 16 / last[16]


def test_without_a_free_slot_a_request_waits_for_the_shortest() -> None:
    batch = ContinuousBatch(simulation(decode_sequence_s=0.0, prefill_tokens_per_s=1e9), slots=2)
    arrivals = [(0.0, Request([index], reply(tokens))) for index, tokens in enumerate((2, 9, 3))]
    assert ends(batch, arrivals) == {0: pytest.approx(2.0), 1: pytest.approx(10.0), 2: pytest.approx(5.0)}


def test_a_request_joins_between_two_steps() -> None:
    batch = ContinuousBatch(simulation(decode_sequence_s=0.0, prefill_tokens_per_s=1e9), slots=2)
    times = ends(batch, [(0.0, Request([1], reply(9))), (3.5, Request([2], reply(2)))])
    assert times == {0: pytest.approx(9.0), 1: pytest.approx(6.0)}


def test_a_cancelled_request_takes_no_time_of_the_batch() -> None:
    batch = ContinuousBatch(simulation(), slots=1)
    first, second = Request([1], reply(50)), Request([2], reply(2))
    batch.add(first, 0.0)
    batch.add(second, 0.0)
    batch.remove(first)
    assert batch.advance(1.2) == [] and batch.next_at is not None
    assert batch.advance(10.0) == [second] and batch.next_at is None


def test_whole_blocks_that_begin_alike_are_reused_but_never_a_whole_prompt() -> None:
    cache = PrefixCache(100, block_size=4)
    text = list(range(12))
    assert cache.reusable(text) == 0
    cache.hold(text)
    assert cache.reusable(text) == 8  # its last token is computed in any case
    assert cache.reusable([*text, 99]) == 12
    assert cache.reusable([*text[:7], 99, *text[8:]]) == 4
    assert cache.reusable(text[4:]) == 0  # the same tokens behind other ones
    cache.clear()
    assert cache.reusable(text) == 0


def test_a_full_cache_forgets_the_oldest_and_the_ends_first() -> None:
    cache = PrefixCache(16, block_size=4)
    first, second, third = ([seed] * 9 for seed in (1, 2, 3))
    cache.hold(first)
    cache.hold(second)
    cache.hold(first)
    cache.hold(third)  # two blocks in the place of the second's
    assert [cache.reusable(text) for text in (first, second, third)] == [8, 0, 8]
    cache.hold([4] * 4)
    assert [cache.reusable(text) for text in (first, second, third)] == [4, 0, 8]


def test_reused_tokens_are_counted_and_cost_no_time() -> None:
    batch = ContinuousBatch(simulation(cache_tokens=1000), slots=1)
    prompt = list(range(100))
    times = ends(batch, [(0.0, Request(prompt, reply(2)))])
    longer = [*prompt, *reply(2).token_ids, *range(50)]  # the prompt, its response, and what is new
    again = ends(batch, [(100.0, Request(longer, reply(2)))])
    assert times == {0: pytest.approx(1.0 + 2 * 1.1)}
    assert again == {0: pytest.approx(100.0 + 0.52 + 2 * 1.1)}
    assert batch.counts == Counts(2, 252, 100, 4)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    loop.close()


def test_a_simulated_engine_keeps_the_contract_of_engines(loop: asyncio.AbstractEventLoop) -> None:
    quick = simulation(replies=tuple(reply(tokens) for tokens in (4, 8, 9)), decode_step_s=0.01, decode_sequence_s=0.0)
    engine = simulated(quick)(0, engines_config("float32"), "anywhere", on_gpu=False)

    def submit(method: str, *args: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(getattr(engine, method)(*args), loop)

    submit("start").result(30)
    keeps_the_contract(submit, "anywhere", max_tokens=9)
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=3)
    with pytest.raises(RunFailed, match="longer than a response may be"):
        submit("generate", [1, 2], sampling, 0, 60.0).result(30)
    counts = submit("counts").result(30)
    assert counts["requests"] >= 10 and 0 < counts["reused_tokens"] < counts["prompt_tokens"]
    submit("shutdown").result(30)


@pytest.mark.ray
def test_the_pool_serves_simulated_engines(tmp_path: Path) -> None:
    import oel_ray.cluster.session  # noqa: F401 - sets what Ray reads when it is imported

    import ray  # isort: skip

    from oel_ray.engines.pool import engine_pool

    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=9)
    quick = simulation(decode_step_s=0.01, decode_sequence_s=0.0)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        config = engines_config("float32", count=2)
        with engine_pool(config, tmp_path, on_gpu=False, engine=simulated(quick)) as pool:
            pool.deploy(tmp_path, "r001")

            async def ask() -> list[Any]:
                client = pool.client
                return await asyncio.gather(*(client([1] * 10, sampling, seed=0, key=key) for key in "abcd"))

            assert {(answer.text, answer.weight_version) for answer in asyncio.run(ask())} == {("3 tokens", "r001")}
            counts = ray.get([engine.counts.remote() for engine in pool.engines()], timeout=30)
    finally:
        ray.shutdown()
    assert [count["requests"] for count in counts] == [2, 2]
