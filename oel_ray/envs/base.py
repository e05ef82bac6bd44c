"""What an environment is. Runs wherever environments run: player actors, planning and replay tasks."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Step(NamedTuple):
    """The game's answer to one response.

    `action` is what was read from the response ("" if nothing), in the game's own canonical form, e.g. "[up]".
    `feedback` is the text that the player is shown next. `outcome` says how the game ended, "" while it goes on.
    """

    action: str
    feedback: str
    done: bool
    outcome: str


class Environment(Protocol):
    """One game, built from a seed and parameters, used once.

    `instructions` tell the player what it may know before its first move; `map_hash` identifies the content of the
    game that the seed drew (equal content, equal hash); `actions` are what the random player draws from, empty where
    that makes no sense. All three are there from construction on.
    """

    instructions: str
    map_hash: str
    actions: Sequence[str]

    def reset(self) -> str:
        """Start the game and return what the player is shown first. Called once."""

    def step(self, response: str) -> Step:
        """Read an action from a whole model response and play it. Not called after a step that was `done`."""

    def success(self) -> bool:
        """Whether the game was won. Read by evaluation alone; never part of a trajectory."""

    def solution(self) -> list[str] | None:
        """A shortest winning sequence of actions from the start, [] if there is none, None if nobody can tell."""
