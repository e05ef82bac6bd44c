"""The searches on boards made by hand, where the shortest play is known."""

from oel_ray.envs.solvers import solve_frozen_lake, solve_sokoban

WALL, FLOOR, TARGET, BOX, PLAYER = 0, 1, 2, 4, 5


def test_the_lake_solver_finds_the_shortest_way_round_holes() -> None:
    assert solve_frozen_lake([" H ", "   ", "HHG"], (0, 0)) == ["[down]", "[right]", "[right]", "[down]"]
    assert solve_frozen_lake(["GH ", " H ", "    "], (2, 0)) == ["[up]", "[up]"]


def test_a_lake_without_a_way_has_an_empty_solution() -> None:
    assert solve_frozen_lake([" H ", "H  ", "  G"], (0, 0)) == []


def test_the_sokoban_solver_finds_a_single_push() -> None:
    fixed = [[0, 0, 0, 0, 0], [0, 1, 1, 2, 0], [0, 0, 0, 0, 0]]
    room = [[0, 0, 0, 0, 0], [0, PLAYER, BOX, 2, 0], [0, 0, 0, 0, 0]]
    assert solve_sokoban(fixed, room) == ["[right]"]


def test_a_box_in_a_corner_cannot_be_solved() -> None:
    fixed = [[0, 0, 0, 0, 0], [0, 2, 1, 1, 0], [0, 0, 0, 0, 0]]
    room = [[0, 0, 0, 0, 0], [0, 2, PLAYER, BOX, 0], [0, 0, 0, 0, 0]]
    assert solve_sokoban(fixed, room) == []


def test_two_boxes_need_both_targets() -> None:
    fixed = [[0] * 7, [0, 2, 1, 1, 1, 2, 0], [0] * 7]
    room = [[0] * 7, [0, 2, BOX, PLAYER, BOX, 2, 0], [0] * 7]
    assert solve_sokoban(fixed, room) == ["[left]", "[right]", "[right]"]


def test_a_sokoban_search_beyond_its_limit_gives_none() -> None:
    size = 8
    fixed = [[0 if {r, c} & {0, size - 1} else 1 for c in range(size)] for r in range(size)]
    fixed[1][1] = 2
    room = [row[:] for row in fixed]
    room[4][4], room[5][5] = BOX, PLAYER
    assert solve_sokoban(fixed, room, limit=50) is None
    assert solve_sokoban(fixed, room)
