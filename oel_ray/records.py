"""The nouns that travel between stages and rest in the run folder. Any process; imports no Ray, torch or vLLM.

Everything here is text and token ids. A trajectory holds no reward and no success bit, because the server side
reads it; `EvaluationGame` adds success, and only evaluation reads that.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

Params = dict[str, bool | int | float | str | list[int]]
EndedBy = Literal["environment", "turn_limit", "context_limit"]
TrainingSplit = Literal["extraction", "consolidation"]
Split = Literal[TrainingSplit, "held_out"]
Rejection = Literal["control", "url", "code"]
"""What speaks against an item of knowledge: marks of a turn or special tokens, addresses, code."""


class Record(BaseModel):
    """An immutable value with a strict schema and a JSON form of one line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> bytes:
        """One line of JSON, fields in the order of declaration, no trailing newline."""
        return orjson.dumps(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, line: bytes | str) -> Self:
        return cls.model_validate_json(line)


class Sampling(Record):
    """How an engine samples one response. `temperature` 0 is greedy; `top_k` 0 is off; `max_tokens` in new tokens."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int


class Frame(Record):
    """What a chat template puts before and after a user's message, where the model is to answer.

    A run takes it once, when it begins, because a template may say what day it is.
    """

    before: str
    after: str


class Generation(Record):
    """One response of an engine, as the engine returned it.

    `token_ids` are the response's own ids, with the end token where the model wrote one; `text` is without it.
    `cached_tokens` of the prompt came from the engine's prefix cache, which depends on what was asked before.
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    weight_version: str
    cached_tokens: int = 0


class Generate(Protocol):
    """How players, chains and the trainer ask the engine pool for one response.

    `key` names the requests that share a prefix (an episode, a knowledge text): they are routed to one engine.
    Raises `EngineUnavailable` when no engine answers within its deadline.
    """

    async def __call__(self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, key: str) -> Generation: ...


class Turn(Record):
    """One exchange: what the game showed, what the model wrote, what the game answered.

    `observation` is the text that is new to the player at this turn. `action` is what was read from the response
    and handed to the game ("" when nothing could be read). `feedback` is the game's answer, which is the next
    turn's observation.
    """

    observation: str
    response: str
    prompt_ids: list[int]
    response_ids: list[int]
    action: str
    feedback: str
    weight_version: str
    finish_reason: str


class Episode(Record):
    """A game to be played: everything that fixes it except the policy."""

    id: str
    round: int
    split: Split
    env: str
    params: Params
    seed: int
    map_hash: str


class Experience(Record):
    """What happened, as the server side reads it: texts and responses in turn, and the outcome text.

    It has no reward and no success bit, and nothing of the environment that it comes from.
    """

    id: str
    round: int
    split: Split
    instructions: str
    template: str
    turns: list[Turn]
    outcome: str
    ended_by: EndedBy


class Trajectory(Experience, Episode):
    """A finished game: an experience that was planned as an episode."""


class EvaluationGame(Trajectory):
    """A held-out game with its result.

    `knowledge_seed` names the text in the prompt, `knowledge_step` says how many trajectories had been read for it (0
    if the text is from elsewhere). Both are None for the bare policy.
    """

    condition: Literal["policy", "in_context"]
    sampling_seed: int
    knowledge_seed: int | None
    success: bool
    knowledge_step: int | None = None


class AccumulationStep(Record):
    """What one trajectory added to one accumulation.

    `status` is "added", or the reason why nothing was: "unclosed_thought", "no_items", "over_long", "repeated" or
    "rejected". `rejected` counts items that were not taken, by reason: "empty", "over_long", "repeated", or a
    `Rejection`. `dropped` counts the oldest items that left the text to keep it within L_max.
    """

    index: int
    trajectory_id: str
    status: Literal["added", "unclosed_thought", "no_items", "over_long", "repeated", "rejected"]
    added: list[str]
    rejected: dict[str, int] = {}
    dropped: int
    knowledge_tokens: int
    response_tokens: int
    weight_version: str


class KnowledgeItem(Record):
    """One item of a knowledge text and the trajectory that it came from."""

    text: str
    trajectory_id: str


class KnowledgeText(Record):
    """The result of one accumulation: the final text (e^k) and how it came about.

    `withdrawn` names games whose items somebody took out of it afterwards; the steps still show them.
    """

    id: str
    round: int
    seed: int
    format: Literal["structured", "unstructured", "raw"]
    text: str
    tokens: int
    items: list[KnowledgeItem]
    steps: list[AccumulationStep]
    withdrawn: list[str] = []


class Prefix(Record):
    """The history before one response of a trajectory: a place where the student writes a new response.

    `prompt_ids` is the student's prompt.
    """

    id: str
    trajectory_id: str
    turn: int
    prompt_ids: list[int]


class Gate(Record):
    """How a new policy did against the one that was deployed, and which of the two is from then on.

    Policies are named by the round that they come from. `difference` is the new pass rate minus the old one's, its
    standard error clustered by map.
    """

    old: int
    difference: float
    difference_se: float
    deployed: int

    def __str__(self) -> str:
        what = "stays" if self.deployed == self.old else "gives way"
        change = f"{100 * self.difference:+.1f} ± {100 * self.difference_se:.1f}"
        return f"the policy of round {self.old} {what}: the new one's pass rate differs by {change} points"


class StepRow(Record, extra="allow"):
    """A line of `consolidation/metrics.jsonl`: one optimizer step. None is a number that was not finite.

    `kl_per_token` is in nats. The `teacher_` counts say how often a text was found on the device, brought back from the
    host, encoded again, and sent to the host. Defaults are for lines of earlier versions.
    """

    step: int
    samples: int = 0
    loss: float | None
    kl_per_token: float | None
    tokens: int = 0
    grad_norm: float | None = None
    learning_rate: float = 0.0
    applied: bool = True
    memory_retries: int = 0
    seconds_generate: float = 0.0
    seconds_train: float = 0.0
    seconds_sync: float = 0.0
    sync_bytes: int = 0
    teacher_hits: int = 0
    teacher_loads: int = 0
    teacher_builds: int = 0
    teacher_offloads: int = 0
    generated_by: str
    weight_version: str


class SampleRow(Record, extra="allow"):
    """A line of `consolidation/samples.jsonl`: one response that was trained on. None is a KL that was not finite."""

    step: int
    prefix_id: str
    knowledge_id: str | None
    response: str
    response_ids: list[int]
    kl: float | None
    weight_version: str


class BadLine(Record):
    """A line that is not the record that it should be; `line` counts from 1."""

    line: int
    reason: str
    text: str


AnyRecord = TypeVar("AnyRecord", bound=Record)


def write_jsonl(path: Path, records: Sequence[Record]) -> int:
    """Write one record a line; returns their number."""
    with path.open("wb") as file:
        file.writelines(record.to_json() + b"\n" for record in records)
    return len(records)


def append_jsonl(path: Path, *records: Record) -> None:
    """Append one record a line, all in one write."""
    with path.open("ab") as file:
        file.write(b"".join(record.to_json() + b"\n" for record in records))


def read_jsonl(path: Path, kind: type[AnyRecord]) -> list[AnyRecord]:
    """Read what `write_jsonl` wrote.

    Raises:
        pydantic.ValidationError: a line does not fit the schema.
    """
    return [kind.from_json(line) for line in path.read_bytes().splitlines()]


def content_hash(*parts: Any) -> str:
    """Sixteen hex digits that identify JSON-like content."""
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def first_problem(error: ValidationError) -> str:
    """Where a record does not fit its schema and why, in one short line that a terminal takes as text."""
    first = error.errors()[0]
    where = ascii(".".join(map(str, first["loc"])))[1:-1]
    return f"{where[:100]}: {first['msg']}".removeprefix(": ")


def join_items(items: Sequence[str]) -> str:
    """Write a knowledge text of its items, a line each."""
    return "\n".join(items)
