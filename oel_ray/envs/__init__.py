"""Environments: the user's side. Runs in player actors and in the tasks that plan and replay games, never in threads.

An environment object is built from (id, seed, parameters), plays one game and is thrown away. The server side
(`extract`, `consolidate`) never imports this package.
"""

from oel_ray.envs.base import Environment, Step
from oel_ray.envs.registry import make

__all__ = ["Environment", "Step", "make"]
