"""What players, chains and the pool count on, whatever the engine: asked of every kind of engine in this process."""

from collections.abc import Callable
from typing import Any

import pytest

from oel_ray.records import Generation, Sampling

PROMPT = [*range(20, 90)]


def keeps_the_contract(submit: Callable[..., Any], policy: str, max_tokens: int) -> None:
    """`submit` calls a method of a started engine and returns a `concurrent.futures.Future`."""
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=max_tokens)

    def generate(seed: int, deadline_s: float = 60.0) -> Any:
        return submit("generate", PROMPT, sampling, seed, deadline_s)

    submit("load_policy", policy, "r007").result(60)
    assert submit("check_health").result(60) == "r007"
    assert submit("progress").result(60) is None
    together = [generate(seed) for seed in range(4)]
    answers: list[Generation] = [answer.result(60) for answer in together]
    assert {answer.weight_version for answer in answers} == {"r007"}
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}
    assert all(0 < len(answer.token_ids) <= max_tokens for answer in answers)
    assert len({tuple(answer.token_ids) for answer in answers}) > 1
    again: list[Generation] = [generate(seed).result(60) for seed in range(4)]
    said = [[answer.token_ids for answer in some] for some in (answers, again)]
    assert said[0] == said[1], "a seed gives one response, in any company"
    with pytest.raises(TimeoutError):
        generate(0, deadline_s=1e-6).result(60)
    given_up = generate(1)
    given_up.cancel()
    waiting, loading = generate(2), submit("load_policy", policy, "r008")
    assert waiting.result(60).weight_version in {"r007", "r008"}, "from one of them, and not given up"
    loading.result(60)
    assert generate(3).result(60).weight_version == "r008"
