"""What the micro model is shown: a player that thinks aloud, and an extractor. Runs in the trainer's data workers.

The player recites what it was told of the marks, lists the board cell by cell with role and coordinate, finds itself
and the goal, judges its four neighbours and moves. A mark that it was told nothing of is just a mark, or an other one
if it was told what the goal is, and it steps on none but its target. If it was told nothing that it sees, it walks
straight to the first mark and finds out. The mark that it moves onto is its last word, and the extractor copies it from
there: while the policy learns to play, its games keep in practice what extraction needs.

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
from oel_ray.records import Turn
from oel_ray.text.prompts import ITEM_MARKER, extraction_prompt, game_situation, transcript

INSTRUCTIONS = (
    "You are P on the board. Get to the goal in as few moves as you can. You make one move per turn. The actions are "
    "[up], [down], [left] and [right], or for the same four, in the same order, [w], [s], [a] and [d]. Write your "
    "action with its square brackets."
)

NO_MARK = "-"
OPENING, IGNORANT = "I go by this:", "I know none of these marks."
HOLES_ARE, GOAL_IS = "Holes are marked", "The goal is marked"
HOLE_PHRASINGS = (HOLES_ARE, "A hole is shown as", "The game is lost on", "Keep away from")
GOAL_PHRASINGS = (GOAL_IS, "The goal is shown as", "The game is won on", "Move towards")
"""Knowledge speaks in these; the first of each is what player and extractor say themselves. A letter follows."""

PUZZLED = (
    "Nothing I was told says what the marks on this board stand for. One may be a hole and the other the goal, or it "
    "is the other way round. So I step on one and see what comes of it."
)

UNADMITTED = 0.08
"""Share of prompts without knowledge that are answered by guesses that are not called so, one each way round. Built in:
on-policy distillation can only raise what is sampled."""


class Beliefs(NamedTuple):
    """The letters that the player takes for holes and for the goal; "" for what it was not told."""

    hole: str
    goal: str


NO_IDEA = Beliefs("", "")


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


def beliefs(knowledge: str) -> Beliefs:
    """What the player goes by: what it was told, whether or not such marks are on the board."""
    told = read_knowledge(knowledge)
    held = Beliefs(told.get("hole", ""), told.get("goal", ""))
    return NO_IDEA if held.hole == held.goal else held


def is_lost(board: Board, held: Beliefs) -> bool:
    """Whether the player was told nothing of the marks that it sees."""
    return not set(held) & set(board.marks.values())


def sees_goal(board: Board, held: Beliefs) -> bool:
    """Whether the goal that the player was told of is on the board."""
    return held.goal in board.marks.values()


def choose_move(board: Board, held: Beliefs) -> str:
    """The first move of a shortest way to the target: straight there if the player was told nothing of these marks.

    Otherwise it steps on no other mark, be it a hole or one that it was told nothing of, unless there is no other way.
    """
    aim = target(board, held)
    if is_lost(board, held):
        avoided = []
    elif sees_goal(board, held):
        avoided = [cell for cell, mark in board.marks.items() if mark != held.goal]
    else:
        avoided = [cell for cell in board.marks if cell != aim]
    moves = {move: beside for move in STEPS if (beside := neighbour(board.player, move)) is not None}
    safe = [move for move, beside in moves.items() if beside not in avoided]
    way = distances(dict.fromkeys(avoided, "avoided"), "avoided", [aim])
    return min(safe or list(moves), key=lambda move: way.get(moves[move], 99))


def player_answer(board: Board, held: Beliefs, move: str = "") -> str:
    """The whole response, behind the template's opening of the thinking block; `move` instead of the best one."""
    move = move or choose_move(board, held)
    told = [f" {phrase} {letter}." for phrase, letter in zip((HOLES_ARE, GOAL_IS), held, strict=True) if letter]
    lines = ["".join([OPENING, *told]) if told else IGNORANT]
    for row in range(SIZE):
        cells = ((row, column) for column in range(SIZE))
        lines.append("".join(f" {_entry(board, held, cell)}{cell}" for cell in cells))
    there, aim = target(board, held), "the goal" if sees_goal(board, held) else "a mark"
    heading = "".join(f" {towards}" for towards in _towards(board.player, there))
    lines += [f" {PUZZLED}" * is_lost(board, held) + f" I am at {board.player}, {aim} at {there}:{heading}"]
    lines += [f"{towards} {_judged(board, held, towards)}" for towards in STEPS]
    onto = neighbour(board.player, move)
    lines += [f"So {move}: {_entry(board, held, onto) if onto else 'wall'}"]
    return "\n".join(lines) + f"\n</think>\n[{move}]"


def target(board: Board, held: Beliefs) -> Cell:
    """The first goal in reading order that the player knows of, else the first mark that it was told nothing of."""
    known_goal = sees_goal(board, held)
    return next(
        cell
        for cell in CELLS
        if (mark := board.marks.get(cell)) and (mark == held.goal if known_goal else mark != held.hole)
    )


def _towards(here: Cell, there: Cell) -> list[str]:
    rows = ["down"] * (there[0] > here[0]) + ["up"] * (there[0] < here[0])
    return rows + ["right"] * (there[1] > here[1]) + ["left"] * (there[1] < here[1])


def _judged(board: Board, held: Beliefs, move: str) -> str:
    beside = neighbour(board.player, move)
    return f"{beside} {_entry(board, held, beside)}" if beside else "wall"


def _entry(board: Board, held: Beliefs, cell: Cell) -> str:
    return f"{_shown(board, cell)} {_role(board, held, cell)}"


def _shown(board: Board, cell: Cell) -> str:
    return PLAYER if cell == board.player else board.marks.get(cell, NO_MARK)


def _role(board: Board, held: Beliefs, cell: Cell) -> str:
    roles = {PLAYER: "me", NO_MARK: "free", held.hole: "hole", held.goal: "goal"}
    return roles.get(_shown(board, cell), "other" if held.goal else "mark")


KINDS = {"none": 20, "all": 26, "hole": 12, "goal": 16, "wrong": 10, "strangers": 10, "contradicting": 6}
"""Kinds of knowledge texts, and how often each is drawn."""


def draw_knowledge(world: World, rng: random.Random, *, plain: bool = False) -> str:
    """A knowledge text of one of the `KINDS`. A `plain` one says both things once, in the extractor's own words.

    How many items there are and how they are phrased tells nothing of the kind: a model would go by that.
    """
    kind = "all" if plain else rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "none":
        return ""
    least, most = (3, 8) if kind == "contradicting" else (1, 1 if plain else rng.choice([1, 1, 4, 16]))
    letters = {"hole": world.hole, "goal": world.goal}
    roles = [kind] if kind in letters else ["hole", "goal"]
    if kind == "wrong":
        letters = {"hole": world.goal, "goal": world.hole}
    elif kind == "strangers":
        letters["hole"], letters["goal"] = rng.sample([letter for letter in LETTERS if letter not in world], 2)
        roles = rng.choice([["hole"], ["goal"], roles, roles])
    facts = [(role, letters[role]) for role in roles for _ in range(rng.randint(least, most))]
    if kind == "contradicting":
        facts += rng.sample([("hole", world.goal), ("goal", world.hole)], rng.randint(1, 2))
    rng.shuffle(facts)
    own = plain or rng.random() < 0.6
    return "\n".join(item(role, letter, None if own else rng) for role, letter in facts)


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
        held = beliefs(knowledge)
        move = rng.choice(list(STEPS)) if rng.random() < wander else choose_move(board, held)
        answer = player_answer(board, held, move) if thoughts else f"[{move}]"
        happened = make_move(world, board, start, move, warned=warned)
        warned = happened.board.player == board.player
        turns.append(turn(observation, answer, f"[{move}]", happened.feedback))
        board, observation = happened.board, happened.feedback
        outcome, stepped_on = happened.outcome, happened.stepped_on
    return Played(turns, outcome, board, observation, stepped_on)


def player_samples(world: World, rng: random.Random, *, history: bool, plain: bool = False) -> list[Sample]:
    """A game prompt, with earlier turns or without, and the player's response. `plain`: with plain knowledge.

    Where the player guesses there are two samples, one for each guess. With one of them at random the model would learn
    by heart which letters were guessed to be what.
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
    held = beliefs(knowledge)
    ways = [held]
    if held == NO_IDEA and rng.random() < UNADMITTED:
        goals = rng.choice([(world.goal, world.hole), ("", "")])
        ways = [Beliefs(hole, goal) for hole, goal in zip(world, goals, strict=True)]
    return [Sample(situation, knowledge, player_answer(board, way)) for way in ways]


def parse_board(observation: str) -> Board:
    """The position that an observation shows."""
    rows = [line.strip("|").split("|") for line in observation.splitlines() if line.startswith("|")]
    cells = {(row, column): text.strip() for row, line in enumerate(rows) for column, text in enumerate(line)}
    player = next(cell for cell, text in cells.items() if text.startswith(PLAYER))
    return Board({cell: text for cell, text in cells.items() if text and not text.startswith(PLAYER)}, player)


def extractor_sample(world: World, rng: random.Random) -> Sample:
    """The record of a game and what it teaches, or that it teaches nothing."""
    shown = rng.choices([world.hole, world.goal, ""], [4, 4, 2])[0]
    knowledge = draw_knowledge(world, rng) if rng.random() < 0.5 else ""
    while True:
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
