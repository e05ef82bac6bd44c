"""Provide environments: the user's side. Runs in player actors and in tasks that plan and replay games, not in threads.

An environment object is built from (id, seed, parameters), plays one game and is discarded. The server side (`extract`,
`consolidate`) never imports this package.
"""

from oel_ray.envs.base import Environment, Step
from oel_ray.envs.registry import make

__all__ = ["Environment", "Step", "make"]
