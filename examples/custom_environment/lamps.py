"""Rooms in a row, each with a lamp and three doors. Runs in player actors and in the tasks that plan and replay games.

The hidden rule: under a red lamp the green door opens, under a green lamp the blue one, under a blue lamp the red one.
"""

import random
from collections.abc import Mapping
from typing import Any, ClassVar

from oel_ray.envs import Step

OPENS = {"red": "green", "green": "blue", "blue": "red"}
PLACES = ("left", "middle", "right")


class Lamps:
    """See `oel_ray.envs.base.Environment`."""

    defaults: ClassVar[Mapping[str, Any]] = {"rooms": 4}
    instructions = "You walk through rooms. Get out. Choose one door per turn: [left], [middle] or [right]."
    actions = tuple(f"[{place}]" for place in PLACES)

    def __init__(self, seed: int, params: dict[str, Any]) -> None:
        chance = random.Random(seed)
        self.lamps = [chance.choice(list(OPENS)) for _ in range(params["rooms"])]
        self.doors = [chance.sample(list(OPENS), k=3) for _ in self.lamps]
        self.map_hash = repr((self.lamps, self.doors))
        self.room = 0

    def reset(self) -> str:
        return self._look()

    def step(self, response: str) -> Step:
        found = {response.rfind(action): action for action in self.actions}
        if max(found) < 0:
            return Step("", "You stand still: write [left], [middle] or [right].", False, "")
        action = found[max(found)]
        door, lamp = self.doors[self.room][self.actions.index(action)], self.lamps[self.room]
        if door != OPENS[lamp]:
            return Step(action, f"The {door} door stays shut under the {lamp} lamp. {self._look()}", False, "")
        self.room += 1
        if self.success():
            return Step(action, f"The {door} door opened under the {lamp} lamp.", True, "You got out.")
        return Step(action, f"The {door} door opened under the {lamp} lamp. {self._look()}", False, "")

    def success(self) -> bool:
        return self.room == len(self.lamps)

    def solution(self) -> list[str] | None:
        rooms = zip(self.lamps, self.doors, strict=True)
        return [self.actions[doors.index(OPENS[lamp])] for lamp, doors in rooms]

    def _look(self) -> str:
        doors = ", ".join(f"{place} {door}" for place, door in zip(PLACES, self.doors[self.room], strict=True))
        return f"Room {self.room + 1} of {len(self.lamps)}. The lamp is {self.lamps[self.room]}. Doors: {doors}."
