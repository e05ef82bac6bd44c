"""Consolidation through all its real parts: engines, teacher, DeepSpeed on two ranks, weights sent each step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import ray

from oel_ray.cluster.session import ray_cluster
from oel_ray.config.load import parse_config
from oel_ray.config.schema import RunConfig
from oel_ray.consolidate.job import Job
from oel_ray.consolidate.prefixes import Draw
from oel_ray.consolidate.stage import consolidate
from oel_ray.engines.client import Pool
from oel_ray.engines.pool import engine_pool
from oel_ray.models.resolve import SMOLLM2, resolve_model
from oel_ray.records import KnowledgeText, Prefix
from oel_ray.text.chat import ChatFormat

STEPS, LEARNING_RATE = 4, 1e-5
MANY_STEPS, LOW_RATE = 20, 3e-6
KNOWLEDGE = (
    "- EXPERIENCE ITEM: The player always answers in capital letters: GREEN, RED, BLUE.\n"
    "- EXPERIENCE ITEM: The right colour is GREEN."
)
QUESTIONS = [
    "Which colour do you like best?",
    "Name a colour.",
    "What should I paint my door?",
    "Tell me about paint.",
]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return parse_config(
        {
            "model": SMOLLM2,
            "policy_dtype": "float32",
            "consolidate": {
                "steps": STEPS,
                "learning_rate": LEARNING_RATE,
                "precision": "float32",
                "micro_batch_tokens": 256,
                "gradient_checkpointing": False,
                "sampling": {"temperature": 0, "max_tokens": 10},
            },
            "extract": {"max_tokens": 256, "sampling": {"max_tokens": 64}},
            "engines": {"dtype": "float32", "device": "cpu", "max_model_len": 2048, "max_num_seqs": 8},
        }
    )


@pytest.fixture(scope="module")
def pool(config: RunConfig) -> Iterator[Pool]:
    policy = resolve_model(config.model, print)
    with ray_cluster(config, "test-consolidation", print), engine_pool(config.engines, policy, on_gpu=False) as pool:
        yield pool


def run(config: RunConfig, pool: Pool, knowledge: str, steps: int, folder: Path) -> list[dict[str, Any]]:
    """The metrics of `steps` steps, each on all questions, from the untouched model."""
    policy = resolve_model(config.model, print)
    chat = ChatFormat.from_pretrained(policy, thinking=False)
    prefixes = [
        Prefix(id=f"q/{n}", trajectory_id=f"q{n}", turn=n, prompt_ids=chat.game_ids(question))
        for n, question in enumerate(QUESTIONS)
    ]
    text = KnowledgeText(id="k", round=1, seed=0, format="structured", text=knowledge, tokens=0, items=[], steps=[])
    pool.deploy(policy, "r000")
    job = Job(
        config=config,
        round=1,
        policy=policy,
        teacher=policy,
        deployed="r000",
        prefixes=prefixes,
        knowledge=[text],
        plan=[[Draw(n, 0) for n in range(len(prefixes))]] * steps,
        generate=pool.client,
        engines=pool.engines,
        on_gpu=False,
        metrics=folder / "metrics.jsonl",
        samples=folder / "samples.jsonl",
        target=folder / "target",
        profile=folder / "profile",
        scratch=folder / "scratch",
    )
    assert consolidate(job, folder.name, lambda *_: None, print) == steps * len(prefixes)
    return [orjson.loads(line) for line in job.metrics.read_bytes().splitlines()]


def test_without_knowledge_the_loss_of_untouched_weights_is_zero(config: RunConfig, pool: Pool, tmp_path: Path) -> None:
    """Zero at rest: every slip of an index, a template or a weight on the long way would show here."""
    (row,) = run(config, pool, "", 1, tmp_path)
    assert row["tokens"] > 0
    assert abs(row["loss"]) < 1e-6


def test_knowledge_is_distilled_into_the_weights(config: RunConfig, pool: Pool, tmp_path: Path) -> None:
    rows = run(config, pool, KNOWLEDGE, STEPS, tmp_path)
    kl = [row["kl_per_token"] for row in rows]
    print("reverse KL per step:", [round(value, 4) for value in kl])
    assert kl[0] > 0.05, "the knowledge says nothing that the model does not do anyway"
    assert sum(kl[-3:]) / 3 <= 0.7 * kl[0]
    assert [row["generated_by"] for row in rows] == ["r000", *(row["weight_version"] for row in rows[:-1])]
    health = ray.get([engine.check_health.remote() for engine in pool.engines()], timeout=60)
    assert health == [rows[-1]["weight_version"]]


@pytest.mark.slow
def test_with_staleness_1_it_learns_from_responses_of_the_step_before(
    config: RunConfig, pool: Pool, tmp_path: Path
) -> None:
    rows = run(changed(config, max_staleness=1, learning_rate=LOW_RATE), pool, KNOWLEDGE, MANY_STEPS, tmp_path)
    kl = [row["kl_per_token"] for row in rows]
    assert sum(kl[-3:]) / 3 <= 0.7 * kl[0]
    assert [row["generated_by"] for row in rows] == ["r000", "r000", *(row["weight_version"] for row in rows[:-2])]


@pytest.mark.parametrize("steps", [2, pytest.param(MANY_STEPS, marks=pytest.mark.slow)])
def test_off_policy_the_teacher_generates_and_the_engines_keep_its_weights(
    config: RunConfig, pool: Pool, tmp_path: Path, steps: int
) -> None:
    config = changed(config, responses="teacher", divergence="forward", learning_rate=LOW_RATE)
    rows = run(config, pool, KNOWLEDGE, steps, tmp_path)
    kl = [row["kl_per_token"] for row in rows]
    print("forward KL per step:", [round(value, 4) for value in kl])
    assert steps < MANY_STEPS or sum(kl[-3:]) / 3 <= 0.7 * kl[0]
    assert {row["generated_by"] for row in rows} == {"r000"}
    health = ray.get([engine.check_health.remote() for engine in pool.engines()], timeout=60)
    assert health == ["r000"]
    samples = [orjson.loads(line) for line in (tmp_path / "samples.jsonl").read_bytes().splitlines()]
    assert sum("GREEN" in sample["response"] for sample in samples) >= len(samples) / 4, "the knowledge was not read"


def changed(config: RunConfig, **settings: Any) -> RunConfig:
    return config.model_copy(update={"consolidate": config.consolidate.model_copy(update=settings)})
