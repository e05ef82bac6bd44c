"""Define the environment interface. Runs wherever environments run: player actors, planning and replay tasks."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Step(NamedTuple):
    """The game's answer to one response.

    `action` was read from the response ("" if none could be), in the game's own canonical form, e.g. "[up]". `feedback`
    is the next text for the player. `outcome` says how the game ended, "" while it goes on.
    """

    action: str
    feedback: str
    done: bool
    outcome: str


class Environment(Protocol):
    """One game, built from a seed and parameters, used once.

    `instructions` tell the player all that it may know before its first move. `map_hash` identifies the content of the
    game that the seed drew (equal content, equal hash). The random player draws from `actions`; they are empty if the
    game has no fixed list. All three exist after construction.
    """

    instructions: str
    map_hash: str
    actions: Sequence[str]

    def reset(self) -> str:
        """Start the game and return the first text for the player. Called once."""

    def step(self, response: str) -> Step:
        """Read an action from a whole model response and play it. Not called after a step that was `done`."""

    def success(self) -> bool:
        """Tell whether the game was won. Used by evaluation only; never part of a trajectory."""

    def solution(self) -> list[str] | None:
        """Find a shortest winning sequence of actions from the start; [] if there is none, None if that is unknown."""
