"""Write every text that a model reads. Any process; pure functions of text.

A game prompt is one user message in two parts, `GAME_HEAD` and `game_situation(...)`. The student reads these two. The
teacher reads them with `knowledge_section(...)` between them. The parts are tokenised separately (`oel_ray.text.chat`),
so each ends with a line break and the next starts with a letter.
"""

from collections.abc import Sequence

from oel_ray.records import Turn

GAME_TEMPLATE = "turns-1"
"""Names the wording below in every trajectory; changes whenever a game prompt would."""

WITHOUT_ACTIONS = "turns-1-no-actions"
"""The same wording without the player's own actions, as the official code shows Sokoban."""
ITEM_MARKER = "- EXPERIENCE ITEM:"

GAME_HEAD = (
    "You are playing a text game that you have to figure out as you go. "
    "Look at the situation, decide on a single next action, and give it in square brackets at the end of your "
    "answer.\n\n"
)

_QUESTION = "Which action do you take now? Finish with exactly one action in square brackets."


def game_template(*, show_actions: bool) -> str:
    """Name the wording of game prompts."""
    return GAME_TEMPLATE if show_actions else WITHOUT_ACTIONS


def knowledge_section(knowledge: str) -> str:
    """Write the section between head and situation in a prompt with knowledge; "" for no knowledge."""
    if not knowledge.strip():
        return ""
    return (
        "Here is what was learned in earlier games about how this game works and how to win it. It was pieced "
        "together from experience, so parts may be missing or mistaken; let it guide your decision.\n\n"
        f"{knowledge.strip()}\n\n"
    )


def game_situation(instructions: str, turns: Sequence[Turn], observation: str, template: str = GAME_TEMPLATE) -> str:
    """Write the second part of a game prompt: instructions, every exchange so far, the observation, the question."""
    parts = ["What you were told:", instructions.strip(), ""]
    for number, turn in enumerate(turns, start=1):
        parts += [f"Shown at turn {number}:", turn.observation.strip("\n"), ""]
        if template != WITHOUT_ACTIONS:
            parts += [f"Your action at turn {number}: {turn.action or '(none could be read)'}", ""]
    parts += [f"Shown now, at turn {len(turns) + 1}:", observation.strip("\n"), "", _QUESTION]
    return "\n".join(parts)


def with_result(outcome: str, *, won: bool) -> str:
    """Add the result of the game, in words, to an outcome."""
    return f"The game was {'won' if won else 'lost'}. {outcome}".strip()


def transcript(instructions: str, turns: Sequence[Turn], outcome: str, skipped: int = 0) -> str:
    """Write a played game for the extractor: observations and whole responses in turn, then the outcome.

    The first `skipped` turns are left out, and the text says so.
    """
    parts = ["Instructions given to the player:", instructions.strip(), ""]
    if skipped:
        parts += [f"(The first {skipped} turns are left out.)", ""]
    for number, turn in enumerate(turns[skipped:], start=skipped + 1):
        parts += [f"Turn {number}, the game shows:", turn.observation.strip("\n"), ""]
        parts += [f"Turn {number}, the player answers:", turn.response.strip(), ""]
    final = turns[-1].feedback.strip("\n") if turns else ""
    if final:
        parts += ["At the end the game shows:", final, ""]
    parts += ["How it ended:", outcome.strip()]
    return "\n".join(parts)


def extraction_prompt(game: str, previous: str, *, structured: bool, show_previous: bool) -> str:
    """Ask for the lessons of one game. `game` is a `transcript`; `previous` is the knowledge accumulated so far."""
    parts = [
        "You keep a growing notebook of experience about a game whose rules nobody has explained.",
        "Below is the record of one more game.",
        "",
        "=== Record of the game ===",
        game,
        "=== End of the record ===",
        "",
    ]
    if show_previous:
        parts += ["=== Notebook so far ===", previous.strip() or "(empty)", "=== End of the notebook ===", ""]
    added = " What you write is added to the notebook, so leave out what it says already." if show_previous else ""
    parts += [
        "Go through the record turn by turn and compare what the player did with what happened next. Work out which "
        "rules the game seems to follow, why this game ended the way it did, and which way of playing should win.",
        "Write down what is new in it: short statements that help in any game of this kind, whatever its board looks "
        f"like.{added}",
    ]
    if structured:
        parts += [
            "Think first. Then end your answer with one or two items, each on a line of its own that begins with "
            f"exactly this mark:\n{ITEM_MARKER} <one statement>",
        ]
    else:
        parts += ["Think first, then give only the experience to be added."]
    return "\n".join(parts)
