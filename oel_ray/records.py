"""Define the records that stages exchange and the run folder stores. Any process; imports no Ray, torch or vLLM.

All records are text and token ids. A trajectory holds no reward and no success bit, because the server side reads it.
`EvaluationGame` adds success, which only evaluation reads.
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
"""Reasons to reject an item of knowledge: turn markers or special tokens, web addresses, code."""


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
    """The text of a chat template before and after a user's message, up to the model's response.

    A run renders it once, at its start, because a template may contain the date.
    """

    before: str
    after: str


class Generation(Record):
    """One response of an engine, as the engine returned it.

    `token_ids` are the response's own ids, with the end token if the model wrote one; `text` is without it.
    `cached_tokens` of the prompt came from the engine's prefix cache, so they depend on earlier requests.
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    weight_version: str
    cached_tokens: int = 0


class Generate(Protocol):
    """The call by which players, chains and the trainer request one response from the engine pool.

    `key` names the requests that share a prefix (an episode, a knowledge text): they are routed to one engine.
    Raises `EngineUnavailable` when no engine answers within its deadline.
    """

    async def __call__(self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, key: str) -> Generation: ...


class Turn(Record):
    """One exchange: the game's observation, the model's response, the game's feedback.

    `observation` is the text that is new to the player in this turn. `action` was read from the response and passed to
    the game ("" if none could be read). `feedback` is the observation of the next turn.
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
    """A game as the server side reads it: texts and responses in turn, and the outcome text.

    It has no reward and no success bit, and no data of its environment.
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

    `knowledge_seed` names the text in the prompt. `knowledge_step` is the number of trajectories read for it (0 for an
    imported text). Both are None for the bare policy.
    """

    condition: Literal["policy", "in_context"]
    sampling_seed: int
    knowledge_seed: int | None
    success: bool
    knowledge_step: int | None = None


class AccumulationStep(Record):
    """One step of an accumulation: the items that one trajectory added.

    `status` is "added", or the reason why nothing was: "unclosed_thought", "no_items", "over_long", "repeated" or
    "rejected". `rejected` counts the items that were not added, by reason: "empty", "over_long", "repeated", or a
    `Rejection`. `dropped` counts the oldest items that were removed to keep the text within L_max.
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
    """The result of one accumulation: the final text (e^k), its items and its steps.

    `withdrawn` names games whose items a user removed later; the steps still show them.
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
    """The comparison of a new policy with the deployed one, and the policy that is deployed after it.

    Policies are named by their round. `difference` is the new pass rate minus the old one. Its standard error is
    clustered by map.
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

    `kl_per_token` is in nats. The `teacher_` counts say how often a text was found on the device, loaded from the host,
    encoded, and offloaded to the host. Defaults are for lines of earlier versions.
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
    """A line that does not fit its record; `line` counts from 1."""

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
    """Read the records of a file of `write_jsonl`.

    Raises:
        pydantic.ValidationError: a line does not fit the schema.
    """
    return [kind.from_json(line) for line in path.read_bytes().splitlines()]


def content_hash(*parts: Any) -> str:
    """Hash JSON-like content to sixteen hex digits. The order of keys does not matter."""
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def first_problem(error: ValidationError) -> str:
    """Describe the first field that does not fit the schema, in one short line that is safe for terminals."""
    first = error.errors()[0]
    where = ascii(".".join(map(str, first["loc"])))[1:-1]
    return f"{where[:100]}: {first['msg']}".removeprefix(": ")


def join_items(items: Sequence[str]) -> str:
    """Join items into a knowledge text, separated by line breaks."""
    return "\n".join(items)
