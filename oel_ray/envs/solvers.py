"""Find shortest solutions of the two grid games by breadth-first search. Runs where baselines are planned; pure.

Actions are in the games' canonical form, e.g. "[up]".
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

Cell = tuple[int, int]
State = TypeVar("State", bound=Hashable)

MOVES: dict[str, Cell] = {"[up]": (-1, 0), "[down]": (1, 0), "[left]": (0, -1), "[right]": (0, 1)}

# Cell codes of TextArena's Sokoban rooms.
_WALL, _TARGET, _BOX_ON_TARGET, _BOX, _PLAYER = 0, 2, 3, 4, 5


def solve_frozen_lake(grid: Sequence[Sequence[str]], start: Cell) -> list[str]:
    """Find the shortest way from `start` to a "G" that avoids every "H"; [] if there is none."""
    cells = {(r, c): cell for r, row in enumerate(grid) for c, cell in enumerate(row)}

    def neighbours(position: Cell) -> Iterator[tuple[str, Cell]]:
        for action, change in MOVES.items():
            after = _shift(position, change)
            if cells.get(after, "H") != "H":
                yield action, after

    return _search(start, neighbours, lambda position: cells[position] == "G", limit=len(cells)) or []


def solve_sokoban(
    fixed: Sequence[Sequence[int]], room: Sequence[Sequence[int]], *, limit: int = 200_000
) -> list[str] | None:
    """Find the shortest play that puts every box on a target; [] if there is none, None beyond `limit` positions.

    `fixed` holds walls and targets, `room` the player and the boxes, in TextArena's cell codes.
    """
    floor = {(r, c) for r, row in enumerate(fixed) for c, code in enumerate(row) if code != _WALL}
    targets = {(r, c) for r, row in enumerate(fixed) for c, code in enumerate(row) if code == _TARGET}
    cells = {(r, c): code for r, row in enumerate(room) for c, code in enumerate(row)}
    player = next(cell for cell, code in cells.items() if code == _PLAYER)
    start_boxes = frozenset(cell for cell, code in cells.items() if code in (_BOX_ON_TARGET, _BOX))

    def neighbours(state: tuple[Cell, frozenset[Cell]]) -> Iterator[tuple[str, tuple[Cell, frozenset[Cell]]]]:
        position, boxes = state
        for action, change in MOVES.items():
            after = _shift(position, change)
            if after in boxes:
                pushed = _shift(after, change)
                if pushed in floor and pushed not in boxes:
                    yield action, (after, boxes - {after} | {pushed})
            elif after in floor:
                yield action, (after, boxes)

    return _search((player, start_boxes), neighbours, lambda state: state[1] <= targets, limit=limit)


def _shift(cell: Cell, change: Cell) -> Cell:
    return cell[0] + change[0], cell[1] + change[1]


def _search(
    start: State,
    neighbours: Callable[[State], Iterator[tuple[str, State]]],
    won: Callable[[State], bool],
    *,
    limit: int,
) -> list[str] | None:
    met = {start}
    queue = deque([(start, list[str]())])
    while queue:
        state, way = queue.popleft()
        if won(state):
            return way
        for action, after in neighbours(state):
            if after not in met:
                met.add(after)
                queue.append((after, [*way, action]))
        if len(met) > limit:
            return None
    return []
