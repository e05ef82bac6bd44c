"""Synthetic worlds: Frozen Lake with other symbols. Runs in the trainer's data workers; pure functions of a `Random`.

A world says which letter marks holes and which the goal. In its texts it is the real game with other letters, to the
byte (tests compare the two). The real game's letters, H for holes and G for the goal, make a pair in neither split.
"""

import random
from collections import deque
from collections.abc import Mapping
from itertools import combinations, permutations
from typing import Literal, NamedTuple

from oel_ray.envs.solvers import MOVES, Cell

SIZE = 4
PLAYER = "P"
LETTERS = tuple("ABCDEFGHJKLMNOQRSTUVWXYZbcdefghijklmnopqrstuvwxyz")
"""What holes and goals may be marked with: not the player's letter, and no word of one letter.

So many because of pairs: of a few hundred pairs a model learns by heart which goes with which."""

REAL = ("H", "G")
WALL_NOTICE = (
    "You attempted an invalid move. Reason: You tried to move {move} but hit a wall! Please resubmit a valid move and "
    "remember to follow the game rules to avoid penalties."
)
LIMIT = 10
"""Turns of a game, as in the quickstart."""

_RULE = "+" + "+".join(["-----"] * SIZE) + "+"
_ACTIONS = "Available Actions: [up], [down], [left], [right], [w], [a], [s], [d]"
CELLS = tuple((row, column) for row in range(SIZE) for column in range(SIZE))
STEPS: dict[str, Cell] = {action.strip("[]"): change for action, change in MOVES.items()}


class World(NamedTuple):
    """Which letter marks a hole and which the goal."""

    hole: str
    goal: str


def worlds(split: Literal["train", "held_out"]) -> list[World]:
    """All worlds of a split. About one in eight is held out; the real one belongs to neither.

    Two letters are in one split whichever way round: who has seen G and H exchanged is not ignorant of the real game,
    but prejudiced against it.
    """
    pairs = [pair for pair in combinations(LETTERS, 2) if set(pair) != set(REAL)]
    random.Random(8).shuffle(pairs)
    cut = len(pairs) // 8
    chosen = pairs[:cut] if split == "held_out" else pairs[cut:]
    return [World(*ordered) for pair in chosen for ordered in permutations(pair)]


class Board(NamedTuple):
    """A position: what lies where (only marked cells are in `marks`), and where the player stands."""

    marks: Mapping[Cell, str]
    player: Cell

    def shown(self) -> str:
        """The board as the game draws it."""
        lines = [_RULE]
        for row in range(SIZE):
            cells = (f" {self._content((row, column)):^3} " for column in range(SIZE))
            lines += ["|" + "|".join(cells) + "|", _RULE]
        return "\n".join(lines)

    def observation(self, notice: str = "") -> str:
        """What the player is shown; `notice` says what its last move did."""
        board = f"Current Board:\n\n{self.shown()}\n\n{_ACTIONS}"
        return f"{notice}\n\n{board}" if notice else board

    def _content(self, cell: Cell) -> str:
        mark = self.marks.get(cell, " ")
        if cell != self.player:
            return mark
        return PLAYER if self.marks.get(cell) is None else f"{PLAYER}/{mark}"


class Happened(NamedTuple):
    """What a move did. `outcome` is "" while the game goes on."""

    board: Board
    feedback: str
    outcome: str
    stepped_on: str


def draw_board(world: World, rng: random.Random, *, holes: int = 3) -> Board:
    """A start of the game: player and goal in opposite corners, `holes` holes, and a way between them."""
    start = rng.choice([(0, 0), (0, SIZE - 1), (SIZE - 1, 0), (SIZE - 1, SIZE - 1)])
    goal = (SIZE - 1 - start[0], SIZE - 1 - start[1])
    others = [cell for cell in CELLS if cell not in (start, goal)]
    while True:
        marks = dict.fromkeys(rng.sample(others, holes), world.hole) | {goal: world.goal}
        if distances(marks, world.hole, [goal]).get(start) is not None:
            return Board(marks, start)


def anywhere(world: World, rng: random.Random) -> Board:
    """A position for practice: of a game that is going on, or one that no game has.

    In the latter there are as many goals as holes on average, mostly one of each, anywhere on the board: in the game
    itself the goal is the mark that occurs once, in a corner, and a model would go by that and not by what it is told.
    """
    kind = rng.random()
    if kind < 0.25:
        board = draw_board(world, rng, holes=rng.choice([2, 3, 3, 3, 4]))
    else:
        cells = rng.sample(CELLS, rng.randint(3, 7) if kind < 0.75 else 2)
        cut = rng.randint(1, len(cells) - 1)
        board = Board(dict.fromkeys(cells[:cut], world.hole) | dict.fromkeys(cells[cut:], world.goal), cells[0])
    goals = [cell for cell, mark in board.marks.items() if mark == world.goal]
    starts = [cell for cell in distances(board.marks, world.hole, goals) if cell not in goals]
    return board._replace(player=rng.choice(starts)) if starts else anywhere(world, rng)


def distances(marks: Mapping[Cell, str], hole: str, targets: list[Cell]) -> dict[Cell, int]:
    """Moves from each cell to the nearest target around cells marked `hole`; cells without a way lack."""
    found = dict.fromkeys(targets, 0)
    queue = deque(targets)
    while queue:
        cell = queue.popleft()
        for change in STEPS.values():
            beside = (cell[0] + change[0], cell[1] + change[1])
            if beside in CELLS and beside not in found and marks.get(beside) != hole:
                found[beside] = found[cell] + 1
                queue.append(beside)
    return found


def neighbour(cell: Cell, move: str) -> Cell | None:
    """The cell beside, None outside the board."""
    change = STEPS[move]
    beside = (cell[0] + change[0], cell[1] + change[1])
    return beside if beside in CELLS else None


def make_move(world: World, board: Board, start: Cell, move: str, *, warned: bool) -> Happened:
    """Play one move. `warned`: the move before went against a wall too, and the game forgives that once.

    `start` is where the game began; the game's own words on progress depend on it.
    """
    beside = neighbour(board.player, move)
    if beside is None:
        if warned:
            return Happened(board, board.observation(), f"Invalid Move: You tried to move {move} but hit a wall!", "")
        return Happened(board, board.observation(WALL_NOTICE.format(move=move)), "", "")
    after = board._replace(player=beside)
    mark = board.marks.get(beside, "")
    outcome = ""
    if mark == world.hole:
        outcome = (
            f"You fell into a hole! Game over. You completed {_progress(start, beside)}% of the journey to the goal."
        )
        # The board of a lost game shows the player only.
        after = Board({cell: other for cell, other in board.marks.items() if cell != beside}, beside)
    elif mark == world.goal:
        outcome = "Congratulations! You reached the goal!"
    return Happened(after, after.observation(f"You moved {move} to position {beside}."), outcome, mark)


def _progress(start: Cell, cell: Cell) -> int:
    whole = 2 * (SIZE - 1)
    done = min((abs(cell[0] - start[0]) + abs(cell[1] - start[1])) / whole, 0.95)
    return round(100 * max(done, 0.1))
