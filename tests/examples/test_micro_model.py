"""The worlds, demonstrations and tokenizer that the micro model is made with, and the model that comes with oel-ray."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.micro_model import demonstrations as shown
from examples.micro_model.evaluate import PARAMS, knowledge, renamed
from examples.micro_model.tokenizer import END, START, build_tokenizer
from examples.micro_model.train import FIRST_LESSONS, LESSONS, Progress
from examples.micro_model.worlds import CELLS, LETTERS, REAL, STEPS, World, make_move, neighbour, worlds
from oel_ray.envs import make
from oel_ray.envs.solvers import Cell
from oel_ray.envs.textarena import read_action
from oel_ray.extract.items import structured_items
from oel_ray.text.chat import ChatFormat, strip_thinking
from oel_ray.text.prompts import GAME_HEAD, game_situation

WORLDS = st.sampled_from(worlds("train"))
SEEDS = st.integers(0, 2**32)
TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(TOKENIZER, thinking=True)


@pytest.mark.parametrize("seed", range(12))
def test_with_the_real_letters_a_world_is_the_real_game_to_the_byte(seed: int) -> None:
    game, rng = make("FrozenLake-v0", seed, PARAMS), random.Random(seed)
    board = shown.parse_board(game.reset())
    start, warned = board.player, False
    assert board.observation() == game.reset()
    assert game.instructions == shown.INSTRUCTIONS
    for _ in range(12):
        move = rng.choice(list(STEPS))
        step = game.step(f"[{move}]")
        happened = make_move(World(*REAL), board, start, move, warned=warned)
        assert (happened.feedback, happened.outcome) == (step.feedback, step.outcome)
        warned, board = happened.board.player == board.player, happened.board
        if step.done:
            return


def test_the_real_letters_are_in_no_split_and_held_out_worlds_are_not_trained_on() -> None:
    train, held_out = worlds("train"), worlds("held_out")
    pairs, held_out_pairs = {frozenset(world) for world in train}, {frozenset(world) for world in held_out}
    assert frozenset(REAL) not in pairs | held_out_pairs
    assert not pairs & held_out_pairs
    assert len(set(train)) + len(set(held_out)) == len(LETTERS) * (len(LETTERS) - 1) - 2
    assert {letter for world in train for letter in world} == set(LETTERS)


def test_renaming_changes_nothing_but_the_letters_of_a_board() -> None:
    observation = make("FrozenLake-v0", 3, PARAMS).reset()
    other = renamed(observation, World("X", "H"))
    assert (observation.count("H  |"), observation.count("G  |")) == (other.count("X  |"), other.count("H  |"))
    assert other.replace("  H  ", "  G  ").replace("  X  ", "  H  ") == observation
    assert "GAME" in renamed("GAME HALL", World("X", "Y"))


@given(WORLDS, SEEDS)
def test_a_player_that_was_told_reaches_the_goal(world: World, seed: int) -> None:
    rng = random.Random(seed)
    told = knowledge(rng.choice(["all", "hole", "goal", "repeated", "phrased"]), world, rng)
    played = shown.play(world, told, rng, limit=16, wander=0.0, thoughts=False)
    assert played.stepped_on == world.goal


@given(WORLDS, SEEDS, st.booleans())
def test_a_player_recites_what_it_was_told_and_is_puzzled_if_it_sees_none_of_it(
    world: World, seed: int, history: bool
) -> None:
    samples = shown.player_samples(world, random.Random(seed), history=history)
    assert all(read_action(sample.answer, moves_only=True) for sample in samples)
    assert len({sample.situation for sample in samples}) == 1
    told = shown.beliefs(samples[0].knowledge or "")
    puzzled = [shown.PUZZLED in sample.answer for sample in samples]
    recited = [re.findall(r"marked (\w)\.", sample.answer.split("\n")[0]) for sample in samples]
    if len(samples) == 2:
        assert told == shown.NO_IDEA and not any(puzzled)
        assert set(recited[0] + recited[1]) == set(world)
    else:
        assert recited == [[letter for letter in told if letter]]
        assert puzzled == [not set(told) & set(world)]


def test_between_84_and_98_percent_of_players_without_knowledge_say_so() -> None:
    rng = random.Random(0)
    drawn = [shown.player_samples(worlds("train")[0], rng, history=False) for _ in range(600)]
    ignorant = [len(samples) for samples in drawn if len(samples) == 2 or shown.IGNORANT in samples[0].answer]
    assert 0.02 < ignorant.count(2) / len(ignorant) < 0.16


@given(WORLDS, SEEDS)
def test_a_player_that_knows_nothing_walks_straight_to_the_first_mark(world: World, seed: int) -> None:
    board = shown.anywhere(world, random.Random(seed))
    first = next(cell for cell in CELLS if cell in board.marks)
    for held in (shown.NO_IDEA, shown.Beliefs("?", "!")):
        onto = neighbour(board.player, shown.choose_move(board, held))
        assert onto is not None
        assert _steps(onto, first) == _steps(board.player, first) - 1


@given(WORLDS, SEEDS)
def test_a_player_that_knows_something_steps_on_no_mark_but_its_target(world: World, seed: int) -> None:
    board = shown.anywhere(world, random.Random(seed))
    free = [cell for move in STEPS if (cell := neighbour(board.player, move)) and cell not in board.marks]
    for held in (shown.Beliefs(world.hole, world.goal), shown.Beliefs(world.hole, ""), shown.Beliefs("", world.goal)):
        onto = neighbour(board.player, shown.choose_move(board, held))
        assert not free or onto not in board.marks or board.marks[onto] == world.goal


def _steps(here: Cell, there: Cell) -> int:
    return abs(here[0] - there[0]) + abs(here[1] - there[1])


@given(WORLDS, SEEDS)
def test_the_answer_names_each_cell_and_move_by_the_players_beliefs(world: World, seed: int) -> None:
    rng = random.Random(seed)
    board = shown.anywhere(world, rng)
    for held, roles in [
        (shown.Beliefs(world.hole, world.goal), {world.hole: "hole", world.goal: "goal"}),
        (shown.Beliefs(world.goal, world.hole), {world.hole: "goal", world.goal: "hole"}),
        (shown.NO_IDEA, {world.hole: "mark", world.goal: "mark"}),
        (shown.Beliefs(world.hole, ""), {world.hole: "hole", world.goal: "mark"}),
        (shown.Beliefs("", world.goal), {world.hole: "other", world.goal: "goal"}),
    ]:
        answer = shown.player_answer(board, held)
        for cell in CELLS:
            mark = board.marks.get(cell, "-")
            assert (" P me" if cell == board.player else f" {mark} {roles.get(mark, 'free')}") + str(cell) in answer
        for move in STEPS:
            beside = neighbour(board.player, move)
            mark = board.marks.get(beside, "-") if beside else ""
            role = f"{beside} {mark} {roles.get(mark, 'free')}" if beside else "wall"
            assert f"\n{move} {role}\n" in answer


@given(WORLDS, SEEDS)
def test_an_extractor_writes_what_the_last_move_proves_and_nothing_else(world: World, seed: int) -> None:
    sample = shown.extractor_sample(world, random.Random(seed))
    items = structured_items(strip_thinking(sample.answer, thinking=True) or "")
    lost, won = "You fell into a hole!" in sample.situation, "You reached the goal!" in sample.situation
    assert items == [shown.item("hole", world.hole)] * lost + [shown.item("goal", world.goal)] * won


@given(WORLDS, SEEDS)
def test_knowledge_is_read_by_majority(world: World, seed: int) -> None:
    rng = random.Random(seed)
    hole, goal = shown.item("hole", world.hole, rng), shown.item("goal", world.goal, rng)
    mistake = shown.item("hole", world.goal, rng)
    assert shown.read_knowledge("\n".join([mistake, hole, goal, hole])) == {"hole": world.hole, "goal": world.goal}
    assert shown.read_knowledge("\n".join([mistake, hole, goal])) == {"goal": world.goal}


@given(text=st.text(max_size=60))
def test_any_text_decodes_from_its_token_ids_unchanged(text: str) -> None:
    tokenizer = TOKENIZER
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]) == text


def test_fixed_phrases_of_prompts_are_single_tokens(chat: ChatFormat) -> None:
    board = shown.anywhere(World("K", "L"), random.Random(0))
    prompt = chat.game_ids(game_situation(shown.INSTRUCTIONS, [], board.observation()))
    assert len(prompt) < 70
    assert chat.count(GAME_HEAD) == 1
    assert chat.count(shown.item("hole", "K")) == 4
    assert not {chat.tokenizer.convert_tokens_to_ids(token) for token in (START, END)} & set(chat._ids(START + END))


def test_lessons_follow_when_the_first_ones_are_learned_and_the_rate_falls_to_nothing_at_their_end() -> None:
    progress = Progress(4e6, done=1_000_000)
    assert progress.mixture == FIRST_LESSONS
    assert (progress.left, progress.learning_rate()) == (4e6, 1.0)
    progress.first = 1_000_000
    assert progress.mixture == LESSONS
    assert (progress.left, progress.learning_rate()) == (4e6, 1.0)
    progress.done = 4_200_000
    assert progress.learning_rate() == pytest.approx(0.5)
    progress.done = 5_000_000
    assert (progress.left, progress.learning_rate()) == (0, 0)
    assert Progress(4e6).learning_rate() == 0


@pytest.mark.process
def test_a_few_steps_of_training_learn_and_go_on_where_they_were(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.micro_model.train", "--out", str(tmp_path), "--workers", "1"]
    lines = []
    for _ in range(2):
        # Small, because Muon computes in bfloat16 on every processor, also where that is slow.
        small = ["--hidden", "96", "--mlp", "192", "--layers", "2", "--budget", "1500"]
        command_line = [*command, *small, "--minutes", "0.01"]
        done = subprocess.run(command_line, capture_output=True, text=True, timeout=200, check=True)
        lines += [line for line in done.stdout.splitlines() if line.startswith("step")]
    steps = [int(line.split()[1]) for line in lines]
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert steps == [50, 100], "training began again"
    assert losses[-1] < 0.5 * losses[0]
    policy = ChatFormat.from_pretrained(tmp_path, thinking=True)
    policy.check_thinking()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert (tmp_path / "model.safetensors").stat().st_size < 12e6
