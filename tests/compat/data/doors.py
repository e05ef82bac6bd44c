"""An environment as a user wrote it when these files were frozen: a corridor of doors, each opened by its colour."""

import random
from types import MappingProxyType

from oel_ray.envs import Environment, Step, make

__all__ = ["Doors", "Environment", "make"]


class Doors:
    """One corridor."""

    defaults = MappingProxyType({"doors": 3})
    instructions = "You walk along a corridor of doors. Say [red] or [blue]."
    actions = ("[red]", "[blue]")

    def __init__(self, seed, params):
        self.colours = random.Random(seed).choices(self.actions, k=params["doors"])
        self.map_hash = " ".join(self.colours)
        self.opened = 0

    def reset(self):
        return "The first door is shut."

    def step(self, response):
        action = next((word for word in self.actions if word in response), "")
        if action != self.colours[self.opened]:
            return Step(action, "The door stays shut.", False, "")
        self.opened += 1
        if self.success():
            return Step(action=action, feedback="The last door opens.", done=True, outcome="You are out.")
        return Step(action, "The door opens. There is another one.", False, "")

    def success(self):
        return self.opened == len(self.colours)

    def solution(self):
        return list(self.colours)
