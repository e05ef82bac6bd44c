"""Measures a micro model on the real game and on held-out worlds. Run as a script; see README.md.

Games are TextArena's own. In a world other than the real one the letters on its boards are exchanged, nothing else.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from examples.micro_model.demonstrations import INSTRUCTIONS, item, turn
from examples.micro_model.worlds import LETTERS, LIMIT, REAL, SIZE, World, worlds
from oel_ray.config.precision import bfloat16_units
from oel_ray.envs import make
from oel_ray.extract.items import structured_items
from oel_ray.records import Turn
from oel_ray.text import prompts
from oel_ray.text.chat import ChatFormat, strip_thinking

GATE = {"all": 0.6, "none": 0.25}
PARAMS: dict[str, Any] = {"size": SIZE, "num_holes": 3, "randomize_start_goal": True}
FIRST_MAP = 1_000_000
_BATCH = 64
_IN_BFLOAT16 = bool(bfloat16_units())


class Finished(NamedTuple):
    """A game that was played: its world, turns, outcome text, and whether it was won."""

    world: World
    turns: list[Turn]
    outcome: str
    won: bool


class Model:
    """A model in transformers, asked for many responses at a time."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        self.chat = ChatFormat.from_pretrained(folder, thinking=True)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.generation_config.pad_token_id = self.chat.tokenizer.pad_token_id

    def answer(self, prompts_ids: Sequence[list[int]], *, most: int = 192) -> list[tuple[str, int]]:
        """Text and number of tokens of a response to each prompt."""
        import torch

        pad, answers = self.chat.tokenizer.pad_token_id, []
        for start in range(0, len(prompts_ids), _BATCH):
            group = prompts_ids[start : start + _BATCH]
            longest = max(map(len, group))
            ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in group])
            mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in group])
            with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=_IN_BFLOAT16):
                out_BT = self._model.generate(
                    ids_BT,
                    attention_mask=mask_BT,
                    do_sample=True,
                    temperature=0.7,
                    top_p=0.8,
                    top_k=20,
                    max_new_tokens=most,
                )
            for row in out_BT[:, longest:]:
                text = self.chat.tokenizer.decode(row, skip_special_tokens=True)
                answers.append((text, int((row != pad).sum())))
        return answers


def renamed(text: str, world: World) -> str:
    """An observation of the real game as this world shows it."""
    table = str.maketrans({REAL[0]: world.hole, REAL[1]: world.goal})
    return "\n".join(line.translate(table) if line.startswith("|") else line for line in text.split("\n"))


def play(model: Model, games: Sequence[tuple[World, int, str]]) -> tuple[list[Finished], float]:
    """Play games of (world, map, knowledge) side by side; also the mean tokens of a response."""
    environments = [make("FrozenLake-v0", FIRST_MAP + number, PARAMS) for _, number, _ in games]
    shown = [
        renamed(environment.reset(), world) for environment, (world, _, _) in zip(environments, games, strict=True)
    ]
    turns: list[list[Turn]] = [[] for _ in games]
    outcomes = [""] * len(games)
    lengths: list[int] = []
    for number in range(LIMIT):
        playing = [index for index, outcome in enumerate(outcomes) if not outcome]
        asked = [
            model.chat.game_ids(prompts.game_situation(INSTRUCTIONS, turns[i], shown[i]), games[i][2]) for i in playing
        ]
        for i, (response, length) in zip(playing, model.answer(asked), strict=True):
            lengths.append(length)
            step = environments[i].step(response)
            feedback = renamed(step.feedback, games[i][0])
            turns[i].append(turn(shown[i], response, step.action, feedback))
            shown[i] = feedback
            outcomes[i] = step.outcome if step.done else ""
            if not step.done and number == LIMIT - 1:
                outcomes[i] = f"The game was stopped after {LIMIT} turns."
    finished = [Finished(game[0], turns[i], outcomes[i], environments[i].success()) for i, game in enumerate(games)]
    return finished, sum(lengths) / len(lengths)


def knowledge(state: str, world: World, rng: random.Random) -> str:
    """A knowledge text about a world: how much of it the player is told, and whether it is true."""
    hole, goal = ("hole", world.hole), ("goal", world.goal)
    other = rng.sample([letter for letter in LETTERS if letter not in world], 2)
    facts = {
        "all": [hole, goal],
        "none": [],
        "hole": [hole],
        "goal": [goal],
        "repeated": [hole] * 8 + [goal] * 3,
        "phrased": [hole, goal, hole, goal],
        "wrong": [("hole", world.goal), ("goal", world.hole)],
        "strangers": [("hole", other[0]), ("goal", other[1])],
    }[state]
    rng.shuffle(facts)
    return "\n".join(item(role, letter, rng if state == "phrased" else None) for role, letter in facts)


def extraction(model: Model, finished: Sequence[Finished]) -> tuple[float, float]:
    """Precision of the items that the model writes about these games, and recall over what the games reveal."""
    asked = []
    for game in finished:
        record = prompts.transcript(INSTRUCTIONS, game.turns, game.outcome)
        message = prompts.extraction_prompt(record, "", structured=True, show_previous=False)
        asked.append(model.chat.message_ids(message))
    true = written = found = revealed = 0
    for game, (response, _) in zip(finished, model.answer(asked), strict=True):
        items = structured_items(strip_thinking(response, thinking=True) or "")
        facts = {item("hole", game.world.hole): "fell into a hole", item("goal", game.world.goal): "reached the goal"}
        true += sum(text in facts for text in items)
        written += len(items)
        due = [fact for fact, sign in facts.items() if sign in game.outcome]
        revealed += len(due)
        found += sum(fact in items for fact in due)
    return true / max(written, 1), found / max(revealed, 1)


def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of the model.")],
    maps: Annotated[int, typer.Option(help="Maps per measurement.")] = 64,
    states: Annotated[str, typer.Option(help="Knowledge states, with commas.")] = (
        "all,none,hole,goal,repeated,phrased,wrong,strangers"
    ),
    extract: Annotated[bool, typer.Option(help="Also measure extraction.")] = True,
    held_out: Annotated[bool, typer.Option(help="Also play held-out worlds.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
    seed: Annotated[int, typer.Option(help="Of responses and worlds.")] = 0,
) -> None:
    """Pass rates by knowledge, extraction precision and recall; exit 1 if the gate is missed."""
    model, rng = Model(folder, seed=seed), random.Random(seed)
    figures: dict[str, dict[str, float]] = {}
    places = {"real game": [World(*REAL)]} | ({"held-out worlds": worlds("held_out")} if held_out else {})
    for place, known in places.items():
        row = figures[place] = {}
        ignorant: list[Finished] = []
        for state in states.split(","):
            games = []
            for number in range(maps):
                world = known[number % len(known)]
                games.append((world, number, knowledge(state, world, rng)))
            finished, length = play(model, games)
            row[f"pass rate, {state}"] = sum(game.won for game in finished) / maps
            row[f"tokens per turn, {state}"] = length
            print(
                f"{place:16} {state:10} pass {row[f'pass rate, {state}']:.3f}  tokens per turn {length:.1f}", flush=True
            )
            if state in {"none", "all"}:
                ignorant += finished
        if extract and ignorant:
            row["extraction precision"], row["extraction recall"] = extraction(model, ignorant)
            print(
                f"{place:16} extraction precision {row['extraction precision']:.3f}  "
                f"recall {row['extraction recall']:.3f}"
            )
    if out:
        out.write_text(json.dumps({name: figures[name] for name in figures}, indent=1) + "\n")
    real = figures["real game"]
    met = real.get("pass rate, all", 0) >= GATE["all"] and real.get("pass rate, none", 1) <= GATE["none"]
    print(f"gate (all >= {GATE['all']}, none <= {GATE['none']}): {'met' if met else 'missed'}")
    raise typer.Exit(0 if met else 1)


if __name__ == "__main__":
    typer.run(evaluate)
