"""Played games for tests, without an environment."""

from oel_ray.records import Trajectory, Turn
from oel_ray.text import prompts
from oel_ray.text.chat import ChatFormat


def make_trajectory(
    name: str, turns: int = 2, chat: ChatFormat | None = None, response: str = "I try. [up]"
) -> Trajectory:
    """A game of that many turns. With `chat`, the prompt ids are recorded as a player would record them."""
    instructions = f"Game {name}: find out how to win."
    played: list[Turn] = []
    for number in range(turns):
        observation = f"board {number} of {name}\n\n[ ][H]\n"
        situation = prompts.game_situation(instructions, played, observation)
        played.append(
            Turn(
                observation=observation,
                response=response,
                prompt_ids=chat.game_ids(situation) if chat else [],
                response_ids=[7, 8],
                action="[up]",
                feedback=f"board {number + 1} of {name}\n\n[ ][H]\n",
                weight_version="1.0.0",
                finish_reason="stop",
            )
        )
    return Trajectory(
        id=name,
        round=1,
        split="extraction",
        env="Test-v0",
        params={},
        seed=0,
        map_hash=name,
        instructions=instructions,
        template=prompts.GAME_TEMPLATE,
        turns=played,
        outcome=f"End of {name}: fell into a hole.",
        ended_by="environment",
    )
