"""Who writes the responses of a step, when they are asked for, and what is refused. One rank, an engine of our own."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from oel_ray.config.load import parse_config
from oel_ray.config.schema import RunConfig
from oel_ray.consolidate.job import Job
from oel_ray.consolidate.prefixes import Draw
from oel_ray.consolidate.responses import Responses
from oel_ray.errors import RunFailed
from oel_ray.records import Generation, KnowledgeText, Prefix

HEAD = [7, 8]
TEXTS = [[7, 8, 50], [7, 8, 60, 61]]
STEPS = 3


class Engine:
    """Answers with the last id of the prompt, after a while, as the version that it has then."""

    def __init__(self) -> None:
        self.version = "r000"
        self.prompts: list[list[int]] = []
        self.keys: list[str] = []
        self.answered = 0

    async def __call__(self, prompt_ids: list[int], sampling: Any, *, seed: int, key: str) -> Generation:
        self.prompts.append(list(prompt_ids))
        self.keys.append(key)
        await asyncio.sleep(0.05)
        self.answered += 1
        return Generation(text="", token_ids=prompt_ids[-1:], finish_reason="stop", weight_version=self.version)


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('g')}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def responses(engine: Engine, **settings: Any) -> Responses:
    config: RunConfig = parse_config({"consolidate": {"steps": STEPS, "games_per_step": 1, **settings}})
    prefixes = [Prefix(id=f"g{n}/0", trajectory_id=f"g{n}", turn=0, prompt_ids=[*HEAD, 100 + n]) for n in range(6)]
    knowledge = [
        KnowledgeText(id=f"k{n}", round=1, seed=n, format="structured", text="", tokens=0, items=[], steps=[])
        for n in range(2)
    ]
    job = Job(
        config=config,
        round=1,
        policy=Path(),
        teacher=Path(),
        deployed="r000",
        prefixes=prefixes,
        knowledge=knowledge,
        plan=[[Draw(2 * step, 0), Draw(2 * step + 1, 1)] for step in range(STEPS)],
        generate=engine,
        engines=list,
        on_gpu=False,
        metrics=Path(),
        samples=Path(),
        target=Path(),
        profile=Path(),
        scratch=Path(),
    )
    return Responses(job, len(HEAD), TEXTS, 0, 1)


def test_the_student_writes_from_the_bare_prompt_in_the_order_of_the_draws() -> None:
    engine = Engine()
    asked = responses(engine)
    assert not asked.ahead
    asked.ask(1, "r000")
    version, generations = asked.take(1)
    assert version == "r000"
    assert [g.token_ids for g in generations] == [[102], [103]]
    assert sorted(engine.prompts) == [[*HEAD, 102], [*HEAD, 103]]
    assert sorted(engine.keys) == ["g2", "g3"]


def test_the_teacher_writes_with_the_knowledge_in_its_prompt() -> None:
    engine = Engine()
    asked = responses(engine, responses="teacher")
    assert asked.ahead
    asked.ask(0, "r000")
    _, generations = asked.take(0)
    assert [g.token_ids for g in generations] == [[100], [101]]
    assert sorted(engine.prompts) == [[*TEXTS[0], 100], [*TEXTS[1], 101]]
    assert sorted(engine.keys) == ["k0", "k1"], "requests of one text go where its text is cached"


def test_the_next_steps_responses_are_written_while_this_one_trains() -> None:
    engine = Engine()
    asked = responses(engine, max_staleness=1)
    assert asked.ahead
    asked.ask(0, "r000")
    assert asked.take(0)[0] == "r000"
    asked.ask(1, "r000")
    asked.wait(1)  # as before a sync
    assert engine.answered == 4
    engine.version = "r001.s0001.a0"
    asked.ask(2, engine.version)
    assert asked.take(1)[0] == "r000"
    assert asked.take(2)[0] == "r001.s0001.a0"
    asked.ask(STEPS, engine.version)
    asked.wait(STEPS)
    assert engine.answered == 6, "the round has no such step"


def test_a_response_generated_by_other_weights_is_refused() -> None:
    engine = Engine()
    asked = responses(engine)
    asked.ask(0, "r000")
    engine.version = "r001.s0001.a0"
    with pytest.raises(RunFailed, match=r"step 0 got a response of weights r001\.s0001\.a0, expected r000"):
        asked.take(0)
