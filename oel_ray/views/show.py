"""`oel show`: a run, a game or a knowledge text, readable by a person. Any process; imports no Ray, torch or vLLM.

What games and models wrote is printed as text only: no console markup in it is obeyed, and control characters, which
could move the cursor or retitle the terminal, are made visible.
"""

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
from rich import box
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from oel_ray.errors import UserError
from oel_ray.formats import ABSENT, clock, digits
from oel_ray.records import EvaluationGame, Gate, KnowledgeText, StepRow, Trajectory, read_jsonl
from oel_ray.runs.files import read_json
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.layout import BAD_LINES, CONSOLIDATE, EVALUATE, EVALUATE_IN_CONTEXT, EXTRACT, STATUS_FILE
from oel_ray.views.terminal import plain

_SHORT = {EVALUATE_IN_CONTEXT: "in context"}


def show(path: Path, identifier: str | None, console: Console) -> None:
    """Print the run, or the game or knowledge text with this id.

    Raises:
        UserError: no run lies at `path`, or nothing in it has the id.
    """
    folder = RunFolder.open(path)
    if identifier is None:
        _show_run(folder, console)
        return
    known = []
    for file, line, identity in _identified(folder):
        if identity == identifier:
            if file.parent.name == "knowledge":
                _show_knowledge(KnowledgeText.from_json(line), console)
            else:
                kind = Trajectory if file.parent.name == "trajectories" else EvaluationGame
                _show_trajectory(kind.from_json(line), console)
            return
        known.append(identity)
    near = difflib.get_close_matches(identifier, known, n=3, cutoff=0.5) or known[:1]
    raise UserError(f"{path} holds no '{identifier}'" + (f": did you mean {', '.join(near)}?" if near else ""))


def summary_table(path: Path) -> Table:
    """A row per round: how the policy plays, what it learned from, what that took."""
    folder = RunFolder.open(path)
    # Eighty columns hold all of it: single spaces between columns, a line per stage.
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    names = ("round", "pass\nrate %", "random", "oracle", "in\ncontext", "tokens\n/turn", "items\n/text", "reverse KL")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("wall time")
    for number in folder.rounds():
        table.add_row(*_row(folder, number))
    return table


def remarks(path: Path) -> list[str]:
    """What a reader of the figures should know: settings that changed, what the gate said, what was left out."""
    folder = RunFolder.open(path)
    changes = folder.info.get("changes", [])
    said = [f"changed from {change['from']} on: {', '.join(change['changes'])}" for change in changes]
    for number in folder.rounds():
        stages = folder.manifest(number).stages
        bad = sum(entry.counts.get(BAD_LINES, 0) for entry in stages.values())
        if bad:
            said.append(f"round {number}: bad lines of imported games left out: {bad}")
        lost = [not row.applied for row in training_steps(folder, number)]
        if any(lost):
            said.append(f"round {number}: {sum(lost)} of {len(lost)} steps skipped: loss or gradient not finite")
        if EVALUATE in stages and (gate := read_json(folder.files(number).evaluation).get("gate")):
            said.append(f"round {number}: {Gate.model_validate(gate)}")
    return said


def next_steps(path: Path) -> str:
    """Where to look once a run has ended, a line per place."""
    folder = RunFolder.open(path)
    lines = [f"oel show {path}", f"oel verify {path} --replay"]
    last: dict[str, str] = {}
    for number in folder.rounds():
        files, stages = folder.files(number), folder.manifest(number).stages
        if EVALUATE in stages and (game := _first_id(files.evaluation_games)):
            last["a game"] = f"oel show {path} {game}"
        if EXTRACT in stages and (texts := files.knowledge_texts()):
            last["what it learned"] = f"oel show {path} {texts[0].id}"
        if CONSOLIDATE in stages and (deployed := folder.deployed(number + 1)):
            last["the policy"] = str(path / folder.files(deployed).policy.relative_to(folder.path))
    places = {"this table": lines[0], "as a page": f"oel report {path}", **last, "is it sound?": lines[1]}
    width = max(map(len, places)) + 2
    return "\n".join(f"{name + ':':<{width}} {where}" for name, where in places.items())


def training_steps(folder: RunFolder, number: int) -> list[StepRow]:
    """The metrics of a round's training steps; none before all of them are done."""
    path, done = folder.files(number).consolidation_metrics, CONSOLIDATE in folder.manifest(number).stages
    return read_jsonl(path, StepRow) if done else []


def _row(folder: RunFolder, number: int) -> list[str]:
    files, stages = folder.files(number), folder.manifest(number).stages
    evaluation = read_json(files.evaluation) if EVALUATE in stages else {}
    steps = training_steps(folder, number)
    texts = files.knowledge_texts() if EXTRACT in stages else []
    return [
        str(number),
        _rate(evaluation),
        _percent(evaluation.get("random")),
        _percent(evaluation.get("oracle")),
        _percent(evaluation.get("in_context")),
        digits(evaluation.get("response_tokens_per_turn")),
        f"{sum(len(text.items) for text in texts) / len(texts):.1f}" if texts else ABSENT,
        "→".join(digits(row.kl_per_token, ".2g") for row in steps[:1] + steps[-1:]) or ABSENT,
        "\n".join(f"{_SHORT.get(name, name):<11} {clock(entry.wall_s):>5}" for name, entry in stages.items()) or ABSENT,
    ]


def _rate(evaluation: dict[str, Any]) -> str:
    error = evaluation.get("pass_rate_se")
    return _percent(evaluation.get("pass_rate")) + (f"±{100 * error:.1f}" if error is not None else "")


def _percent(value: Any) -> str:
    """A rate, or the rate of a part of `evaluation.json`."""
    rate = value.get("pass_rate") if isinstance(value, dict) else value
    return ABSENT if rate is None else f"{100 * rate:.1f}"


def _show_run(folder: RunFolder, console: Console) -> None:
    config, status = folder.config, read_json(folder.path / STATUS_FILE)
    console.print(plain(f"run {folder.run_id} in {folder.path}: {state_of(status)}"), soft_wrap=True)
    console.print(plain(f"{config.model} plays {config.env.id}, {config.rounds} rounds"), soft_wrap=True)
    console.print(summary_table(folder.path))
    console.print(*(plain(f"{remark}\n") for remark in remarks(folder.path)), sep="", end="", soft_wrap=True)
    console.print(plain(next_steps(folder.path)), soft_wrap=True)


def state_of(status: dict[str, Any]) -> str:
    """What `status.json` says, in words: for a run that has not finished, how far it has come."""
    if status["state"] == "finished":
        return "finished"
    where = ""
    if "stage" in status:
        where = f" in round {status['round']}, {status['stage']} {status['done']}/{status['total']}"
    return f"{status['state']}{where}, last heard of at {status['updated']}"


def _show_trajectory(trajectory: Trajectory, console: Console) -> None:
    console.print(plain(f"{trajectory.id}: {trajectory.env}, round {trajectory.round}, {trajectory.split}", "bold"))
    facts = f"seed {trajectory.seed}, map {trajectory.map_hash}"
    if trajectory.params:
        facts += ", " + ", ".join(f"{key}={value}" for key, value in trajectory.params.items())
    if isinstance(trajectory, EvaluationGame):
        knowledge = "" if trajectory.knowledge_seed is None else f", knowledge {trajectory.knowledge_seed}"
        if trajectory.knowledge_step:
            knowledge += f" after {trajectory.knowledge_step} trajectories"
        facts += f", {trajectory.condition}, sampling seed {trajectory.sampling_seed}{knowledge}"
    console.print(plain(facts))
    console.print(Rule("instructions", align="left", style="dim"))
    console.print(plain(trajectory.instructions))
    for number, turn in enumerate(trajectory.turns):
        title = f"turn {number}: {len(turn.response_ids)} tokens, weights {turn.weight_version}, {turn.finish_reason}"
        console.print(Rule(plain(title), align="left", style="dim"))
        console.print(plain(turn.observation))
        console.print(Text("response", "bold cyan"))
        console.print(plain(turn.response or "(empty)"))
        console.print(Text("action ", "bold cyan") + plain(turn.action or "(none could be read)"))
    console.print(Rule("end", align="left", style="dim"))
    if trajectory.turns and trajectory.turns[-1].feedback:
        console.print(plain(trajectory.turns[-1].feedback))
    console.print(plain(f"{trajectory.outcome or '(no outcome text)'} (ended by {trajectory.ended_by})"))
    if isinstance(trajectory, EvaluationGame):
        console.print(Text("won", "bold green") if trajectory.success else Text("not won", "bold red"))


def _show_knowledge(text: KnowledgeText, console: Console) -> None:
    title = f"{text.id}: {text.format}, round {text.round}, seed {text.seed}, {text.tokens} tokens"
    console.print(plain(title, "bold"))
    outcomes = Counter(step.status for step in text.steps)
    rejected = sum((Counter(step.rejected) for step in text.steps), Counter())
    dropped = sum(step.dropped for step in text.steps)
    console.print(plain(f"{len(text.steps)} trajectories read: {_counted(outcomes)}"))
    console.print(plain(f"items dropped for length: {dropped}; not taken: {_counted(rejected)}"))
    console.print(Rule("items", align="left", style="dim"))
    if not text.items:
        console.print("(none)")
    for item in text.items:
        console.print(plain(item.text))
        console.print(Text("    from ", "dim") + plain(item.trajectory_id))


def _counted(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items()) or "none"


def _identified(folder: RunFolder) -> Iterator[tuple[Path, bytes, str]]:
    """File, JSON and id of every game and knowledge text."""
    for number in folder.rounds():
        files = folder.files(number)
        collected = (files.trajectories("extraction"), files.trajectories("consolidation"))
        for file in (*collected, files.in_context, files.evaluation_games, *files.knowledge_files()):
            for line in file.read_bytes().splitlines() if file.exists() else ():
                yield file, line, orjson.loads(line)["id"]


def _first_id(path: Path) -> str:
    with path.open("rb") as file:
        line = file.readline()
    return str(orjson.loads(line)["id"]) if line else ""
