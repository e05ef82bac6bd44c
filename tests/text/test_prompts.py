import pytest

from oel_ray.records import Turn
from oel_ray.text import prompts
from tests.support.trajectories_for_tests import make_trajectory


def turns(count: int) -> list[Turn]:
    return make_trajectory("x", count, response="<think>maybe</think> I go [up]").turns


def test_a_situation_shows_earlier_actions_but_no_reasoning() -> None:
    text = prompts.game_situation("Find it.", turns(2), "board now\n")
    assert [text.index(part) for part in ("Find it.", "board 0 of x", "board 1 of x", "board now")] == sorted(
        text.index(part) for part in ("Find it.", "board 0 of x", "board 1 of x", "board now")
    )
    assert text.count("[up]") == 2
    assert "maybe" not in text
    assert "turn 3" in text


def test_the_prompt_marks_an_earlier_action_that_could_not_be_read() -> None:
    (turn,) = turns(1)
    assert "(none could be read)" in prompts.game_situation("", [turn.model_copy(update={"action": ""})], "")


def test_a_situation_keeps_indentation_of_boards() -> None:
    assert "\n  [ ]\n" in prompts.game_situation("Find it.", [], "\n  [ ]\n")


def test_a_transcript_holds_whole_responses_and_the_end() -> None:
    text = prompts.transcript("Find it.", turns(2), "You fell.\n")
    assert text.count("<think>maybe</think> I go [up]") == 2
    assert "board 2 of x" in text
    assert text.endswith("How it ended:\nYou fell.")
    assert "left out" not in text


def test_a_transcript_numbers_turns_as_played_when_some_are_left_out() -> None:
    text = prompts.transcript("Find it.", turns(3), "You fell.", skipped=2)
    assert "The first 2 turns are left out" in text
    assert "Turn 3, the game shows:\nboard 2 of x" in text
    assert "Turn 1" not in text and "Turn 2" not in text
    assert "Find it." in text


def test_a_transcript_without_turns_still_says_how_the_game_ended() -> None:
    assert prompts.transcript("Find it.", [], "Broken off.").endswith("How it ended:\nBroken off.")


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("show_previous", [True, False])
def test_an_extraction_prompt_asks_for_the_format_and_shows_what_it_may(structured: bool, show_previous: bool) -> None:
    text = prompts.extraction_prompt("GAME", "KNOWN", structured=structured, show_previous=show_previous)
    assert "GAME" in text
    assert ("KNOWN" in text) == show_previous
    assert (prompts.ITEM_MARKER in text) == structured


def test_an_empty_notebook_is_shown_as_empty() -> None:
    assert "(empty)" in prompts.extraction_prompt("GAME", " ", structured=True, show_previous=True)


def test_empty_knowledge_adds_nothing_to_the_prompt() -> None:
    assert prompts.knowledge_section("") == prompts.knowledge_section(" \n") == ""


def test_the_parts_of_a_game_prompt_meet_at_a_line_break_before_a_letter() -> None:
    section = prompts.knowledge_section("  - x\n")
    situation = prompts.game_situation("Find it.", [], "board")
    assert prompts.GAME_HEAD.endswith("\n") and section.endswith("\n")
    assert section[0].isalpha() and situation[0].isalpha()
