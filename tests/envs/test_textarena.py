"""The adapter against the real games: rules stay hidden, games stay apart, outcomes are what TextArena says."""

import random
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import textarena

from oel_ray.envs import make
from oel_ray.envs.textarena import read_action, single_player_ids
from oel_ray.text import prompts

LAKE = ("FrozenLake-v0", {"size": 3, "num_holes": 2})
ROOM = ("Sokoban-v0", {"num_boxes": 1})

# From the paragraphs that TextArena types as PROMPT; "goal", "puzzle", "P" and the actions may be told.
RULE_WORDS = {
    "FrozenLake-v0": r"\b(holes?|frozen|lake|surface|safe|walk|fall|falling|lose|win|top-left|bottom-right|symbols?)\b"
    r"|'H'|'G'",
    "Sokoban-v0": r"\b(sokoban|push|pull|box|boxes|targets?|walls?|goals?|represented|marked|right next to)\b"
    r"|'X'|'O'|√",
}
IDS = ["FrozenLake-v0", "FrozenLake-v0-random", "FrozenLake-v0-hardcore", "Sokoban-v0"]


def rule_words(env_id: str, text: str) -> list[str]:
    pattern = next(words for prefix, words in RULE_WORDS.items() if env_id.startswith(prefix))
    return [match.group() for match in re.finditer(pattern, text, re.IGNORECASE)]


def dropped_paragraph(env_id: str) -> str:
    game = textarena.make(f"{env_id}-raw")
    game.reset(num_players=1, seed=5)
    messages = game.get_observation()[1]
    return "\n".join(text for _, text, kind in messages if kind == textarena.ObservationType.PROMPT)


@pytest.mark.parametrize("env_id", IDS)
def test_no_rule_reaches_the_player(env_id: str) -> None:
    environment = make(env_id, 5, {})
    first = environment.reset()
    prompt = prompts.GAME_HEAD + prompts.game_situation(environment.instructions, [], first)
    assert "P" in environment.instructions and "[left]" in environment.instructions
    for text in (environment.instructions, first, prompt):
        assert rule_words(env_id, text) == []
    rules = dropped_paragraph(env_id)
    for line in filter(None, map(str.strip, rules.splitlines())):
        assert line not in prompt


@pytest.mark.parametrize("env_id", IDS)
def test_the_leak_check_sees_the_dropped_paragraph(env_id: str) -> None:
    assert len(set(rule_words(env_id, dropped_paragraph(env_id)))) >= 5


@pytest.mark.parametrize("env_id", IDS)
def test_rules_stay_hidden_when_a_game_repeats_them(env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paragraph is dropped by its type at every step, not only at the start."""
    environment = make(env_id, 5, {})
    state = environment._game.state
    state.add_observation(message=dropped_paragraph(env_id), observation_type=textarena.ObservationType.PROMPT)
    feedback = environment.step("no idea").feedback
    assert feedback and dropped_paragraph(env_id) not in feedback


@pytest.mark.parametrize(("env_id", "params"), [LAKE, ROOM, ("2048-v0", {}), ("Blackjack-v0", {})])
def test_a_game_is_the_same_alone_and_among_others(env_id: str, params: dict) -> None:
    moves = ["[up]", "[right]", "[down]", "[left]"] if env_id != "Blackjack-v0" else ["[hit]", "[stand]"] * 2

    def rounds(environment, others) -> list:
        trace = [environment.reset(), environment.map_hash]
        for move in moves:
            for other in others:
                other.step("[left]")
            step = environment.step(move)
            trace.append(step)
            if step.done:
                break
        return trace

    alone = rounds(make(env_id, 11, params), [])
    random.seed(99)
    others = [make("2048-v0", seed, {}) for seed in range(4)] + [make(*pair[:1], 7, pair[1]) for pair in (ROOM,) * 4]
    assert rounds(make(env_id, 11, params), others) == alone


def test_random_draws_within_a_game_are_those_of_the_bare_textarena_game() -> None:
    """2048 draws a tile at every step: the draws continue from step to step although other code draws in between."""
    environment = make("2048-v0", 6, {})
    bare = textarena.make("2048-v0-raw")
    bare.reset(num_players=1, seed=6)
    state = random.getstate()
    for move in ["[left]", "[down]", "[right]", "[up]"] * 3:
        environment.step(move)
        random.setstate(state)
        bare.step(action=move)
        state = random.getstate()
        random.seed(0)
        assert environment._game.state.game_state == bare.state.game_state


def test_the_random_state_of_the_process_is_untouched() -> None:
    random.seed(3)
    np.random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    for env_id, params in (LAKE, ROOM, ("2048-v0", {})):
        environment = make(env_id, 1, params)
        environment.reset()
        environment.step("[down]")
        environment.success()
        environment.solution()
    assert (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]) == before


@pytest.mark.parametrize(("env_id", "params"), [LAKE, ROOM])
def test_an_observation_holds_the_board_once(env_id: str, params: dict) -> None:
    firsts = set()
    for _ in range(5):
        environment = make(env_id, 3, params)
        firsts.add(environment.reset())
        for move in environment.solution() or []:
            assert environment.step(move).feedback.count("Current Board") == 1
    assert len(firsts) == 1
    assert firsts.pop().count("Current Board") == 1


def lake_after(grid_wanted: str, moves: list[str]):
    """The first seed whose 3x3 board looks as wanted, played."""
    for seed in range(500):
        environment = make(LAKE[0], seed, LAKE[1])
        cells = re.findall(r"\|  (.)  (?=\|)", environment.reset())
        if "".join(cells) == grid_wanted:
            return environment, [environment.step(move) for move in moves]
    raise AssertionError("no such board")


def test_falling_into_a_hole_is_no_success_although_textarena_rewards_it() -> None:
    environment, steps = lake_after("P  H  H G", ["[down]"])
    assert steps[-1].done and "hole" in steps[-1].outcome
    assert environment.success() is False
    environment, steps = lake_after("P    HH G", ["[right]", "[right]", "[down]"])
    assert steps[-1].done and environment._game.close()[0][0] > 0.5
    assert environment.success() is False


def test_the_goal_is_a_success() -> None:
    environment, steps = lake_after("P  H  H G", ["[right]", "so: [ D ]", "[s]", "[S]"])
    assert [step.action for step in steps] == ["[right]", "[right]", "[down]", "[down]"]
    assert steps[-1].done and "goal" in steps[-1].outcome
    assert environment.success() is True
    assert [step.done for step in steps[:-1]] == [False] * 3
    assert steps[0].outcome == ""
    assert "You moved right" in steps[0].feedback and "[Player]" not in steps[0].feedback


@pytest.mark.parametrize(("env_id", "params"), [LAKE, ROOM])
def test_two_unreadable_answers_end_the_game(env_id: str, params: dict) -> None:
    environment = make(env_id, 2, params)
    first = environment.step("I do not know")
    assert first.action == "" and not first.done
    assert "invalid move" in first.feedback and "I do not know" not in first.feedback
    second = environment.step("[jump]")
    assert second.done and second.outcome.startswith("Invalid Move")
    assert environment.success() is False


def test_success_is_false_before_the_end() -> None:
    environment = make(*LAKE[:1], 1, LAKE[1])
    assert environment.success() is False


@pytest.mark.parametrize(
    ("response", "action"),
    [
        ("[up]", "[up]"),
        ("[UP] and then [ left ]", "[left]"),
        ("[w]", "[up]"),
        ("[a]", "[left]"),
        ("[s]", "[down]"),
        ("[d]", "[right]"),
        ("[\tDown\n]", "[down]"),
        ("[[right]]", "[right]"),
        ("[up] but never [jump]", "[up]"),
        ("[up", ""),
        ("up", ""),
        ("", ""),
        ("[\u017f]", ""),
        ("[u p]", ""),
        ("<think>[up]</think>[left]", "[left]"),
        ("[up]</think> no move", ""),
        ("<think>maybe [up]", "[up]"),
        ("<think>a</think>[up]<think>b</think>[down]", "[down]"),
        ("\u2603 [\u4e0a] [right] \U0001f600", "[right]"),
    ],
)
def test_the_last_known_move_in_brackets_is_the_action(response: str, action: str) -> None:
    assert read_action(response, moves_only=True) == action


@pytest.mark.parametrize(
    ("response", "action"),
    [
        ("first [A1], then [B 2]", "[B 2]"),
        ("<think>[x]</think> a plain word ", "a plain word"),
        ("[Up] is right", "[Up]"),
        ("[[7]]", "[7]"),
        ("", ""),
    ],
)
def test_in_games_without_moves_the_last_bracket_or_else_the_whole_answer_is_the_action(
    response: str, action: str
) -> None:
    assert read_action(response, moves_only=False) == action


@pytest.mark.parametrize("unit", ["[", "[ ", "]", "</think>", "[up", "\u4e0a[", "[ " + " " * 50])
@pytest.mark.parametrize("moves_only", [True, False])
def test_reading_a_very_long_answer_is_fast(unit: str, moves_only: bool) -> None:
    text = unit * (100_000 // len(unit)) + "[up]"
    started = time.perf_counter()
    assert read_action(text, moves_only=moves_only) == "[up]"
    assert time.perf_counter() - started < 0.5


def test_every_grid_game_survives_odd_answers() -> None:
    for env_id, params in (LAKE, ROOM):
        for answer in ("\x00\ud7ff\U0001f600" * 1000, "[" * 100_000, "[Player] [GAME]", "%s{}\\1"):
            step = make(env_id, 4, params).step(answer)
            assert step.action == "" and step.feedback


@pytest.mark.parametrize("env_id", ["2048-v0", "LightsOut-v0", "GuessTheNumber-v0", "TowerOfHanoi-v0", "Mastermind-v0"])
def test_any_single_player_game_is_played_by_its_own_rules(env_id: str) -> None:
    assert env_id in single_player_ids()
    environment = make(env_id, 3, {})
    assert environment.instructions and environment.actions == () and environment.solution() is None
    assert environment.instructions not in environment.reset()
    hashes = {make(env_id, seed, {}).map_hash for seed in range(6)}
    assert make(env_id, 3, {}).map_hash == environment.map_hash
    assert len(hashes) > 1 or env_id == "TowerOfHanoi-v0"
    assert "echo me" not in environment.step("echo me").feedback


@pytest.mark.parametrize("env_id", ["Countdown-v0", "Cryptarithm-v0", "Slitherlink-v0", "ThreeCardMonte-v0"])
def test_games_that_swap_reason_and_reward_give_the_reason_and_no_success(env_id: str) -> None:
    environment = make(env_id, 3, {})
    assert "Reason: Bad action" in environment.step("hm").feedback.replace("Invalid action", "Bad action")
    last = environment.step("hm")
    assert last.done and re.match(r"Invalid Move: \D", last.outcome)
    assert environment.success() is False


def test_a_board_that_is_laid_out_later_has_a_hash_of_its_seed() -> None:
    first, second = (make("Minesweeper-v0-small", seed, {}) for seed in (1, 2))
    assert first.reset() == second.reset()
    assert first.map_hash != second.map_hash
    assert first.step("[0 0]").feedback != second.step("[0 0]").feedback
    assert make("Minesweeper-v0-small", 1, {}).map_hash == first.map_hash


def test_two_boards_have_the_same_map_hash_only_if_they_are_equal() -> None:
    by_hash: dict[str, set[str]] = {}
    for seed in range(200):
        environment = make(LAKE[0], seed, LAKE[1])
        by_hash.setdefault(environment.map_hash, set()).add(environment.reset())
    assert len(by_hash) == 19
    assert all(len(boards) == 1 for boards in by_hash.values())
    assert len(set.union(*by_hash.values())) == 19


@pytest.mark.process
def test_map_hashes_agree_between_processes() -> None:
    code = (
        "from oel_ray.envs import make\n"
        "for name in ('FrozenLake-v0', 'Sokoban-v0', '2048-v0', 'Set-v0'): print(make(name, 8, {}).map_hash)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [
        make(name, 8, {}).map_hash for name in ("FrozenLake-v0", "Sokoban-v0", "2048-v0", "Set-v0")
    ]


@pytest.mark.parametrize(
    ("env_id", "params", "seeds"),
    [
        (*LAKE, range(15)),
        ("FrozenLake-v0-random", {}, range(15)),
        ("FrozenLake-v0-hardcore", {}, range(5)),
        (*ROOM, range(15)),
        ("Sokoban-v0", {"num_boxes": 2}, range(6)),
        ("Sokoban-v0", {}, range(3)),
    ],
)
def test_playing_the_solution_wins_with_its_last_move(env_id: str, params: dict, seeds: range) -> None:
    for seed in seeds:
        environment = make(env_id, seed, params)
        solution = environment.solution()
        assert solution
        environment.reset()
        steps = [environment.step(move) for move in solution]
        assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
        assert environment.success() is True
