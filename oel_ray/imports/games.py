"""Import trajectories: read them, check them line by line, put them into a round. Runs in the driver.

A few bad lines of many are left out, and kept in the quarantine with the reasons.

A trajectory needs `instructions` and `turns`, and a turn `observation` and `response`. All else is filled in:

    {"instructions": "Open the lock.", "turns": [{"observation": "Locked.", "response": "[left]"}], "outcome": "Open."}

Token ids and weight versions are dropped, because they belong to another tokenizer and other weights.
"""

import codecs
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError

from oel_ray.config.schema import RunConfig
from oel_ray.errors import UserError
from oel_ray.ids import training_id
from oel_ray.records import (
    BadLine,
    EndedBy,
    Params,
    Record,
    TrainingSplit,
    Trajectory,
    Turn,
    content_hash,
    first_problem,
    write_jsonl,
)
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.layout import BAD_LINES, IMPORT_OF
from oel_ray.runs.stage import Stage
from oel_ray.text import prompts
from oel_ray.text.chat import ChatFormat, strip_thinking

_UNKNOWN = {"prompt_ids": [], "response_ids": [], "weight_version": ""}
_NAMED = 5
_ID = re.compile(r"\w[\w.:-]{0,199}", re.ASCII)
_LINE_BYTES = 2**24
"""Most bytes of a line. The schema bounds depth and types of values, the model's context the tokens."""


class Imported(NamedTuple):
    """The content of a file of games: trajectories and bad lines."""

    trajectories: list[Trajectory]
    bad: list[BadLine]


class _GivenTurn(Record):
    observation: str
    response: str
    action: str | None = None
    feedback: str | None = None
    prompt_ids: Any = None
    response_ids: Any = None
    weight_version: Any = None
    finish_reason: str = ""


class _GivenTrajectory(Record, allow_inf_nan=False):
    instructions: str
    turns: Annotated[list[_GivenTurn], Field(min_length=1)]
    outcome: str = ""
    ended_by: EndedBy = "environment"
    id: str | None = None
    env: str | None = None
    params: Params = Field(default_factory=dict)
    seed: int = 0
    map_hash: str | None = None
    round: Any = None
    split: Any = None
    template: Any = None


def put_trajectories(folder: RunFolder, number: int, split: TrainingSplit, imported: Imported) -> None:
    """Put trajectories into a round, for `extract` or `consolidate`, and bad lines into the quarantine."""
    stage = Stage(folder, number, IMPORT_OF[split])
    target = stage.begin().trajectories(split)
    counts = {split: write_jsonl(target, imported.trajectories), BAD_LINES: len(imported.bad)}
    if imported.bad:
        folder.quarantine.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder.quarantine / f"{BAD_LINES}-{number:03d}-{split}.jsonl", imported.bad)
    stage.commit([target], counts)


def read_trajectories(
    path: Path, number: int, split: TrainingSplit, config: RunConfig, chat: ChatFormat, max_bad: float = 0.01
) -> Imported:
    """Read the trajectories of a JSONL file, one a line, for a round. `max_bad` is the share of lines that may be bad.

    Raises:
        UserError: the file cannot be read, holds no trajectory, or has too many bad lines; names them.
    """
    trajectories: list[Trajectory] = []
    bad: list[BadLine] = []
    ids: set[str] = set()
    for line, text in enumerate(content_of(path).removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        if not text.strip():
            continue
        try:
            if len(text) > _LINE_BYTES:
                raise ValueError(f"is longer than {_LINE_BYTES} bytes")
            given = _GivenTrajectory.model_validate_json(text)
            name = given.id or training_id(number, split, line - 1)
            trajectory = _trajectory(given, name, number, split, config, chat)
            problem = next(_problems(trajectory, ids, config, chat), None)
            trajectory.to_json()
        except ValidationError as error:
            problem = first_problem(error)
        except (ValueError, TypeError) as error:  # TypeError for numbers of more than 64 bits
            problem = str(error)
        if problem:
            bad.append(BadLine(line=line, reason=problem, text=text[:_LINE_BYTES].decode(errors="backslashreplace")))
        else:
            ids.add(name)
            trajectories.append(trajectory)
    if len(bad) > max_bad * (len(bad) + len(trajectories)):
        rest = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        count = f"{len(bad)} bad line{'s' if len(bad) > 1 else ''}"
        named = "; ".join(f"line {line.line}: {line.reason}" for line in bad[:_NAMED])
        raise UserError(f"{path} has {count}: {named}{rest}: mend or remove them, or allow a larger share by --max-bad")
    if not trajectories:
        raise UserError(f"{path} holds no trajectory: it must have one JSON object a line")
    return Imported(trajectories, bad)


def _trajectory(
    given: _GivenTrajectory, name: str, number: int, split: TrainingSplit, config: RunConfig, chat: ChatFormat
) -> Trajectory:
    following = [turn.observation for turn in given.turns[1:]] + [""]
    actions = [strip_thinking(turn.response, thinking=chat.thinking) or "" for turn in given.turns]
    turns = [
        Turn.model_validate({"action": action, "feedback": shown} | turn.model_dump(exclude_none=True) | _UNKNOWN)
        for turn, action, shown in zip(given.turns, actions, following, strict=True)
    ]
    return Trajectory(
        **given.model_dump(include={"params", "seed", "instructions", "outcome", "ended_by"}),
        id=name,
        round=number,
        split=split,
        env=given.env or config.env.id,
        map_hash=given.map_hash or content_hash(given.instructions, given.turns[0].observation),
        template=prompts.game_template(show_actions=config.env.show_actions),
        turns=turns,
    )


def _problems(trajectory: Trajectory, ids: set[str], config: RunConfig, chat: ChatFormat) -> Iterator[str]:
    if not _ID.fullmatch(trajectory.id):
        yield f"id {trajectory.id[:50]!r} has characters other than letters, digits and _.:-"
    if trajectory.id in ids:
        yield f"id {trajectory.id} occurs twice"
    for index, (now, then) in enumerate(pairwise(trajectory.turns)):
        if now.feedback != then.observation:
            yield f"the feedback of turn {index} is not what turn {index + 1} observes"
    if trajectory.split == "consolidation":
        room = config.engines.max_model_len - config.consolidate.sampling.max_tokens
        *before, last = trajectory.turns
        situation = prompts.game_situation(trajectory.instructions, before, last.observation, trajectory.template)
        if (tokens := len(chat.game_ids(situation))) > room:
            yield f"its last prompt has {tokens} tokens, {room} fit beside a response in engines.max_model_len"


def content_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}: give the path of a file") from None
