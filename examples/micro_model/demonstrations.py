"""What the micro model is shown: a player that thinks aloud, and an extractor. Runs in the trainer's data workers.

The player says what it takes the marks to stand for, lists the board cell by cell with coordinates, finds itself and
the goal, judges its four neighbours and moves. What it was not told it guesses, anew every turn, and says so. The
extractor looks up what the last move led onto.

The order matters to a model of this size. The listing stands at a fixed distance behind the board, so that a cell is
copied by position; everything else stands before or behind the same word earlier: a letter behind its phrase, a role
before its letter or its coordinate, a coordinate behind its role.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from examples.micro_model.worlds import (
    CELLS,
    LETTERS,
    LIMIT,
    PLAYER,
    SIZE,
    STEPS,
    Board,
    World,
    anywhere,
    distances,
    draw_board,
    make_move,
    neighbour,
)
from oel_ray.envs.solvers import Cell
from oel_ray.prompts import ITEM_MARKER, extraction_prompt, game_situation, transcript
from oel_ray.records import Turn

INSTRUCTIONS = (
    "You are P on the board. Get to the goal in as few moves as you can. You make one move per turn. The actions are "
    "[up], [down], [left] and [right], or for the same four, in the same order, [w], [s], [a] and [d]. Write your "
    "action with its square brackets."
)

NO_MARK = "-"
OPENING = "I go by this:"
HOLES_ARE, GOAL_IS = "Holes are marked", "The goal is marked"
HOLE_PHRASINGS = (HOLES_ARE, "A hole is shown as", "The game is lost on", "Keep away from")
GOAL_PHRASINGS = (GOAL_IS, "The goal is shown as", "The game is won on", "Move towards")
"""Knowledge speaks in these; the first of each is what player and extractor say themselves. A letter follows."""

PUZZLED = (
    "Nothing I was told says what the marks on this board stand for. One may be a hole and the other the goal, or it "
    "is the other way round. So this is no more than a guess."
)

UNADMITTED = 0.12
"""Share of guesses that are not called so. Built in: on-policy distillation can only raise what is sampled."""


class Beliefs(NamedTuple):
    """What the player takes for a hole and for the goal, and which of the two it was told."""

    hole: str
    goal: str
    told: frozenset[str]


class Sample(NamedTuple):
    """One training example. `situation` and `knowledge` make a game prompt; an extractor's has its message alone."""

    situation: str
    knowledge: str | None
    answer: str


def read_knowledge(knowledge: str) -> dict[str, str]:
    """The letters that a text gives for "hole" and "goal": what most of its statements say, nothing on a tie."""
    votes: dict[str, Counter[str]] = {"hole": Counter(), "goal": Counter()}
    for line in knowledge.splitlines():
        statement = line.removeprefix(ITEM_MARKER).strip().removesuffix(".")
        phrase, _, letter = statement.rpartition(" ")
        if phrase in HOLE_PHRASINGS:
            votes["hole"][letter] += 1
        elif phrase in GOAL_PHRASINGS:
            votes["goal"][letter] += 1
    read = {}
    for role, counts in votes.items():
        first = counts.most_common(2)
        if len(first) == 1 or (len(first) == 2 and first[0][1] > first[1][1]):
            read[role] = first[0][0]
    return read


def beliefs(board: Board, knowledge: str, rng: random.Random) -> Beliefs:
    """What the player goes by: what it was told of the marks that it sees, and guesses for the rest."""
    marks = sorted(set(board.marks.values()))
    told = {role: letter for role, letter in read_knowledge(knowledge).items() if letter in marks}
    if len(set(told.values())) < len(told):
        told = {}
    left = [letter for letter in marks if letter not in told.values()]
    rng.shuffle(left)
    hole, goal = (told[role] if role in told else left.pop() for role in ("hole", "goal"))
    return Beliefs(hole, goal, frozenset(told))


def choose_move(board: Board, held: Beliefs) -> str:
    """The first of a shortest way to the believed goal; of two, the vertical one."""
    way = distances(board.marks, held.hole, [target(board, held)])
    moves = {move: beside for move in STEPS if (beside := neighbour(board.player, move)) is not None}
    safe = [move for move, beside in moves.items() if board.marks.get(beside) != held.hole]
    return min(safe or list(moves), key=lambda move: way.get(moves[move], 99))


def player_answer(board: Board, held: Beliefs, rng: random.Random, move: str = "") -> str:
    """The whole response, behind the template's opening of the thinking block; `move` instead of the best one."""
    move = move or choose_move(board, held)
    lines = [f"{OPENING} {HOLES_ARE} {held.hole}. {GOAL_IS} {held.goal}."]
    for row in range(SIZE):
        cells = ((row, column) for column in range(SIZE))
        lines.append("".join(f" {_shown(board, cell)} {_role(board, held, cell)}{cell}" for cell in cells))
    puzzled = not held.told and rng.random() >= UNADMITTED
    there = target(board, held)
    heading = "".join(f" {towards}" for towards in _towards(board.player, there))
    lines += [f" {PUZZLED}" * puzzled + f" I am at {board.player}, the goal at {there}:{heading}"]
    lines += [f"{towards} {_judged(board, held, towards)}" for towards in STEPS]
    onto = neighbour(board.player, move)
    lines += [f"So {move}: {_role(board, held, onto) if onto else 'wall'}"]
    return "\n".join(lines) + f"\n</think>\n[{move}]"


def target(board: Board, held: Beliefs) -> Cell:
    """The believed goal that the player goes for: the first in reading order."""
    return next(cell for cell in CELLS if board.marks.get(cell) == held.goal)


def _towards(here: Cell, there: Cell) -> list[str]:
    rows = ["down"] * (there[0] > here[0]) + ["up"] * (there[0] < here[0])
    return rows + ["right"] * (there[1] > here[1]) + ["left"] * (there[1] < here[1])


def _judged(board: Board, held: Beliefs, move: str) -> str:
    beside = neighbour(board.player, move)
    return f"{beside} {_role(board, held, beside)}" if beside else "wall"


def _shown(board: Board, cell: Cell) -> str:
    return PLAYER if cell == board.player else board.marks.get(cell, NO_MARK)


def _role(board: Board, held: Beliefs, cell: Cell) -> str:
    return {PLAYER: "me", NO_MARK: "free", held.hole: "hole", held.goal: "goal"}[_shown(board, cell)]


def draw_knowledge(world: World, rng: random.Random, *, plain: bool = False) -> str:
    """A knowledge text of one of the kinds: none, all, a part, repeated, contradicting, wrong, of another world.

    A `plain` one says both things, in the extractor's own words.
    """
    if plain:
        facts = [("hole", world.hole), ("goal", world.goal)]
        rng.shuffle(facts)
        return "\n".join(item(role, letter) for role, letter in facts)
    kind = rng.choices(
        ["none", "all", "hole", "goal", "repeated", "contradicting", "wrong", "strangers"], [20, 20, 8, 8, 18, 6, 12, 8]
    )[0]
    stranger = World(*rng.sample([letter for letter in LETTERS if letter not in world], 2))
    hole, goal = [("hole", world.hole)], [("goal", world.goal)]
    if kind == "none":
        return ""
    facts = {
        "all": hole + goal,
        "hole": hole * rng.choice([1, 1, 2, 4]),
        "goal": goal * rng.choice([1, 1, 2, 4]),
        "strangers": [("hole", stranger.hole), ("goal", stranger.goal)] * rng.choice([1, 2]),
        "repeated": hole * rng.randint(1, 16) + goal * rng.randint(1, 16),
        "wrong": [("hole", world.goal), ("goal", world.hole)] * rng.choice([1, 1, 3]),
        "contradicting": hole * rng.randint(3, 8)
        + goal * rng.randint(3, 8)
        + [("hole", world.goal)] * rng.randint(0, 1)
        + [("goal", world.hole)] * rng.randint(0, 1),
    }[kind]
    rng.shuffle(facts)
    own = rng.random() < 0.6
    return "\n".join(item(role, letter, rng if not own else None) for role, letter in facts)


def item(role: str, letter: str, rng: random.Random | None = None) -> str:
    """An experience item; in one of several phrasings with `rng`, else in the extractor's own."""
    phrasings = HOLE_PHRASINGS if role == "hole" else GOAL_PHRASINGS
    return f"{ITEM_MARKER} {rng.choice(phrasings) if rng else phrasings[0]} {letter}."


def turn(observation: str, response: str, action: str, feedback: str) -> Turn:
    """A turn of a synthetic game: texts only."""
    return Turn(
        observation=observation,
        response=response,
        prompt_ids=[],
        response_ids=[],
        action=action,
        feedback=feedback,
        weight_version="",
        finish_reason="stop",
    )


class Played(NamedTuple):
    """A synthetic game: its turns, how it ended ("" if it was left off), the last position, and what was stepped on."""

    turns: list[Turn]
    outcome: str
    board: Board
    observation: str
    stepped_on: str


def play(world: World, knowledge: str, rng: random.Random, *, limit: int, wander: float, thoughts: bool) -> Played:
    """Play from a start for up to `limit` turns; a share `wander` of the moves is random."""
    board = draw_board(world, rng)
    start, observation, warned = board.player, board.observation(), False
    turns: list[Turn] = []
    outcome = stepped_on = ""
    while len(turns) < limit and not outcome:
        held = beliefs(board, knowledge, rng)
        move = rng.choice(list(STEPS)) if rng.random() < wander else choose_move(board, held)
        answer = player_answer(board, held, rng, move) if thoughts else f"[{move}]"
        happened = make_move(world, board, start, move, warned=warned)
        warned = happened.board.player == board.player
        turns.append(turn(observation, answer, f"[{move}]", happened.feedback))
        board, observation = happened.board, happened.feedback
        outcome, stepped_on = happened.outcome, happened.stepped_on
    return Played(turns, outcome, board, observation, stepped_on)


def player_samples(world: World, rng: random.Random, *, history: bool, plain: bool = False) -> list[Sample]:
    """A game prompt, with earlier turns or without, and the player's response. `plain`: with plain knowledge.

    Where the player has to guess there are two samples, one for each guess. With one of them at random the model would
    learn by heart which letters were guessed to be what, and be prejudiced for or against the real game's.
    """
    knowledge = draw_knowledge(world, rng, plain=plain)
    turns: Sequence[Turn] = []
    if history:
        played = play(world, knowledge, rng, limit=rng.randint(1, LIMIT - 1), wander=0.3, thoughts=False)
        turns, board, observation = played.turns, played.board, played.observation
        if played.outcome:  # the position before the move that ended it
            last = turns[-1]
            turns, observation = turns[:-1], last.observation
            board = parse_board(observation)
    else:
        board = anywhere(world, rng)
        observation = board.observation()
    situation = game_situation(INSTRUCTIONS, turns, observation)
    held = beliefs(board, knowledge, rng)
    guesses = [held] if held.told else [held, Beliefs(held.goal, held.hole, held.told)]
    return [Sample(situation, knowledge, player_answer(board, guess, rng)) for guess in guesses]


def parse_board(observation: str) -> Board:
    """The position that an observation shows."""
    rows = [line.strip("|").split("|") for line in observation.splitlines() if line.startswith("|")]
    cells = {(row, column): text.strip() for row, line in enumerate(rows) for column, text in enumerate(line)}
    player = next(cell for cell, text in cells.items() if text.startswith(PLAYER))
    return Board({cell: text for cell, text in cells.items() if text and not text.startswith(PLAYER)}, player)


def extractor_sample(world: World, rng: random.Random) -> Sample:
    """The record of a game and what it teaches, or that it teaches nothing."""
    shown = rng.choices([world.hole, world.goal, ""], [4, 4, 2])[0]
    while True:
        knowledge = draw_knowledge(world, rng) if rng.random() < 0.5 else ""
        limit = rng.choice([2, 3, 4, LIMIT, LIMIT])
        played = play(world, knowledge, rng, limit=limit, wander=rng.choice([0.1, 0.5]), thoughts=True)
        if played.stepped_on == shown and (len(played.turns) <= 4 or rng.random() < 0.5):
            break
    outcome = played.outcome or f"The game was stopped after {len(played.turns)} turns."
    game = transcript(INSTRUCTIONS, played.turns, outcome)
    message = extraction_prompt(game, "", structured=True, show_previous=False)
    return Sample(message, None, extractor_answer(world, played))


def extractor_answer(world: World, played: Played) -> str:
    """What the last move led onto, and the one item that this proves."""
    if not played.stepped_on:
        return "The last move led onto no mark. It shows nothing new.\n</think>\nNothing new."
    role = "hole" if played.stepped_on == world.hole else "goal"
    proof = "That was a hole." if role == "hole" else "That was the goal."
    return f"The last move led onto {played.stepped_on}. {proof}\n</think>\n{item(role, played.stepped_on)}"
