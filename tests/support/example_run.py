"""A small, valid run folder built by hand from records. Two rounds, four held-out maps, no model."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from oel_ray.config.load import parse_config
from oel_ray.config.schema import RunConfig
from oel_ray.ids import evaluation_ids, training_id
from oel_ray.records import (
    AccumulationStep,
    EvaluationGame,
    KnowledgeItem,
    KnowledgeText,
    Split,
    Trajectory,
    Turn,
    write_jsonl,
)
from oel_ray.runs import layout
from oel_ray.runs.files import model_files, write_json
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.schedule import planned_stages
from oel_ray.runs.stage import Stage

HELD_OUT_SEED = 100
WON = [True, False, True, True, False, True, True, True]
WON_EARLY = [True, False, False, True, False, False, True, False]
EARLY_STEP, LAST_STEP = 1, 2
BOARDS = ["S....\n.H...\n....G", ".S...\n.H...\n....G", "..S..\n.H...\n....G"]


def small_config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "rounds": 2,
        "env": {"id": "FrozenLake-v0", "max_turns": 3, "params": {"size": 3}},
        "collect": {"extraction_games": 2},
        "extract": {"seeds": 2},
        "policy_dtype": "float32",
        "consolidate": {"steps": 3, "games_per_step": 1, "precision": "float32"},
        "evaluate": {"maps": 4, "seeds": 2, "accumulation_steps": [EARLY_STEP]},
        "engines": {"max_model_len": 20000, "dtype": "float32"},
    }
    return parse_config(values | changes)


def turns(version: str) -> list[Turn]:
    return [
        Turn(
            observation=board,
            response=f"I try [down], [bold]attempt[/bold] {number}",
            prompt_ids=[1, 2, 3],
            response_ids=[4, 5],
            action="[down]",
            feedback=BOARDS[number + 1],
            weight_version=version,
            finish_reason="stop",
        )
        for number, board in enumerate(BOARDS[:2])
    ]


def trajectory(
    number: int, round_number: int, split: Split, map_name: str, identity: str = "", played_by: int | None = None
) -> Trajectory:
    """`played_by` is the round whose policy played, else the one before."""
    version = f"r{round_number - 1 if played_by is None else played_by:03d}"
    return Trajectory(
        id=identity or training_id(round_number, split, number),
        round=round_number,
        split=split,
        env="FrozenLake-v0",
        params={"size": 3},
        seed=number,
        map_hash=hashlib.sha256(map_name.encode()).hexdigest()[:16],
        instructions="Move on the board.",
        template="turns-1",
        turns=turns(version),
        outcome="You reached the goal.",
        ended_by="environment",
    )


def games(round_number: int, condition: str, step: int = LAST_STEP) -> list[EvaluationGame]:
    result = []
    steps = [None] if condition == "policy" else [EARLY_STEP, LAST_STEP]
    ids = evaluation_ids(round_number, steps, 4, 2)[-8 if step == LAST_STEP else 0 :]
    for number, won in enumerate(WON if step == LAST_STEP else WON_EARLY):
        played_by = round_number if condition == "policy" else round_number - 1
        name = f"held out {number // 2}"
        played = trajectory(number, round_number, "held_out", name, ids[number], played_by).model_dump()
        played["seed"] = HELD_OUT_SEED + number // 2
        extra = {"condition": condition, "sampling_seed": number % 2, "success": won}
        if condition == "in_context":
            extra |= {"knowledge_seed": 0, "knowledge_step": step}
        else:
            extra |= {"knowledge_seed": None}
        result.append(EvaluationGame.model_validate(played | extra))
    return result


RATES = {
    "pass_rate": 0.75,
    "pass_rate_se": 0.14433756729740643,
    "games": 8,
    "seeds": 2,
    "response_tokens_per_turn": 2.0,
}
RATES_EARLY = RATES | {"pass_rate": 0.375, "pass_rate_se": 0.125, "step": EARLY_STEP}


def evaluate(stage: Stage, *, in_context: bool) -> None:
    out = stage.begin()
    write_jsonl(out.evaluation_games, games(stage.round, "policy"))
    seen = {"in_context": RATES if in_context else None, "in_context_steps": [RATES_EARLY] if in_context else []}
    write_json(out.evaluation, RATES | {"random": 0.11, "oracle": 1.0} | seen)
    stage.commit([out.evaluation, out.evaluation_games], {"evaluation": 8})


def prepare(stage: Stage, model: Path) -> None:
    out = stage.begin()
    files = model_files(model) if model.is_dir() else {}
    write_json(out.policy / layout.POLICY_REFERENCE, {"model": str(model), "files": files})
    stage.commit([out.policy], {})


def collect(stage: Stage) -> None:
    out = stage.begin()
    splits: list[tuple[Split, int]] = [("extraction", 2), ("consolidation", 3)]
    for split, count in splits:
        records = [trajectory(number, stage.round, split, f"{split} {number}") for number in range(count)]
        write_jsonl(out.trajectories(split), records)
    outputs = ["trajectories/extraction.jsonl", "trajectories/consolidation.jsonl"]
    stage.commit(outputs, {"extraction": 2, "consolidation": 3})


def knowledge_text(round_number: int, seed: int) -> KnowledgeText:
    sources = [f"r{round_number:03d}-x-{number:04d}" for number in range(2)]
    items = [f"- EXPERIENCE ITEM: thing {number}" for number in range(2)]
    return KnowledgeText(
        id=f"r{round_number:03d}-k{seed:02d}",
        round=round_number,
        seed=seed,
        format="structured",
        text=items[1],
        tokens=7,
        items=[KnowledgeItem(text=items[1], trajectory_id=sources[1])],
        steps=[
            AccumulationStep(
                index=number,
                trajectory_id=sources[number],
                status="added",
                added=[items[number]],
                dropped=number,
                knowledge_tokens=7,
                response_tokens=20,
                weight_version="r000",
            )
            for number in range(2)
        ],
    )


def extract(stage: Stage) -> None:
    out = stage.begin()
    for seed in range(2):
        out.knowledge(seed).write_bytes(knowledge_text(stage.round, seed).to_json())
    stage.commit(["knowledge"], {"knowledge": 2})


def evaluate_in_context(stage: Stage) -> None:
    out = stage.begin()
    played = [game for step in (EARLY_STEP, LAST_STEP) for game in games(stage.round, "in_context", step)]
    stage.commit([out.in_context], {"in_context": write_jsonl(out.in_context, played)})


def consolidate(stage: Stage, deployed: int | None = None) -> None:
    out = stage.begin()
    steps, samples = [], []
    version = f"r{stage.round - 1 if deployed is None else deployed:03d}"
    for step in range(3):
        made_by, version = version, f"r{stage.round:03d}.s{step + 1:04d}.a0"
        kl = 0.4 / (step + 1)
        row = {"step": step, "loss": kl, "kl_per_token": kl, "grad_norm": 1.0, "tokens": 2, "applied": True}
        steps.append(row | {"generated_by": made_by, "weight_version": version, "seconds_step": 0.1})
        sample = {"step": step, "prefix_id": f"r{stage.round:03d}-c-{step:04d}/1"}
        sample |= {"knowledge_id": f"r{stage.round:03d}-k00", "response": "[up]", "response_ids": [4, 5], "kl": kl}
        samples.append(sample | {"weight_version": made_by})
    out.consolidation_metrics.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in steps))
    out.samples.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in samples))
    (out.policy / "config.json").write_text("{}")
    (out.policy / "model.safetensors").write_bytes(bytes(4096))
    stage.commit([out.consolidation_metrics, out.samples, out.policy], {"metrics": 3, "samples": 3})


STAGES: dict[str, Callable[[Stage], None]] = {
    layout.PREPARE: lambda stage: prepare(stage, Path("base-model")),
    layout.COLLECT: collect,
    layout.EXTRACT: extract,
    layout.EVALUATE_IN_CONTEXT: evaluate_in_context,
    layout.CONSOLIDATE: consolidate,
    layout.EVALUATE: lambda stage: evaluate(stage, in_context=stage.round > 0),
}


def run_stages(folder: RunFolder) -> list[str]:
    """Do whatever is not done yet, as a driver does; returns what was done."""
    done = []
    for number in range(folder.config.rounds + 1):
        for name in planned_stages(folder.config, number):
            stage = Stage(folder, number, name)
            if not stage.is_done:
                STAGES[name](stage)
                done.append(f"{number}:{name}")
    return done


def build(path: Path) -> Path:
    with RunFolder.create(path, small_config()) as folder:
        folder.log_metrics({"round": 0, "pass_rate": 0.75})
        run_stages(folder)
    return path


def skip_step(files: layout.RoundFiles, step: int) -> None:
    """Make a training step one that was skipped, as its loss was not finite."""
    skipped = {"applied": False, "loss": None, "kl_per_token": None, "grad_norm": None}
    edit_json(files.consolidation_metrics, lambda row: row.update(skipped), step)
    edit_json(files.samples, lambda sample: sample.update(kl=None), step)


def edit_json(path: Path, change: Callable[[Any], None], line: int = 0) -> None:
    """Change one JSON line of a file, or the whole file if it is one object, and leave everything else."""
    lines = path.read_bytes().splitlines() if path.suffix == ".jsonl" else [path.read_bytes()]
    value = json.loads(lines[line])
    change(value)
    lines[line] = orjson.dumps(value)
    path.write_bytes(b"\n".join(lines) + b"\n")
