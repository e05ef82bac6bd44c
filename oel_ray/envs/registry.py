"""Find and build an environment by its name. Runs wherever environments run.

A package adds environments with entry points of the group `oel_ray.environments`: a name, and a factory `(seed: int,
params: dict) -> Environment`. The factory may have an attribute `defaults`, its parameters with their values. Unknown
parameters are then refused and missing ones filled in. Every other name is a TextArena id. TextArena is imported only
for such a name.
"""

import difflib
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from oel_ray.envs.base import Environment
from oel_ray.errors import UserError, one_line
from oel_ray.records import Params

GROUP = "oel_ray.environments"


def make(env_id: str, seed: int, params: Params) -> Environment:
    """Build one game.

    Raises:
        UserError: the name or a parameter is unknown, or the environment cannot be built with these parameters.
    """
    defaults = parameters(env_id)
    if defaults is not None:
        _check_params(env_id, params, defaults)
    if env_id not in registered():
        from oel_ray.envs.textarena import TextArenaEnvironment

        return TextArenaEnvironment(env_id, seed, params)
    try:
        environment: Environment = _factory(env_id)(seed, {**(defaults or {}), **params})
    except UserError:
        raise
    except Exception as error:
        entry = registered()[env_id].value
        raise UserError(f"environment '{env_id}' ({entry}) cannot be built with {params}: {one_line(error)}") from error
    return environment


def known_ids() -> list[str]:
    """List every name that `make` accepts: registered ones first, then TextArena's single-player games."""
    from oel_ray.envs.textarena import single_player_ids

    return [*sorted(registered()), *(name for name in single_player_ids() if name not in registered())]


def parameters(env_id: str) -> Mapping[str, Any] | None:
    """List the parameters of an environment with their defaults; None if a registered factory declares none.

    Raises:
        UserError: the name is unknown, or the environment cannot be loaded here.
    """
    if env_id in registered():
        defaults = getattr(_factory(env_id), "defaults", None)
        return defaults if isinstance(defaults, Mapping) else None
    from oel_ray.envs import textarena

    if env_id not in textarena.single_player_ids():
        near = difflib.get_close_matches(env_id, known_ids(), n=1, cutoff=0.3)
        hint = f": did you mean '{near[0]}'?" if near else ""
        raise UserError(f"no single-player environment is called '{env_id}'{hint}")
    return textarena.parameters(env_id)


@lru_cache(maxsize=1)
def registered() -> dict[str, EntryPoint]:
    """List the environments of installed packages.

    Read once, because the search through all packages takes milliseconds.
    """
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _factory(env_id: str) -> Any:
    entry = registered()[env_id]
    try:
        return entry.load()
    except Exception as error:
        raise UserError(f"environment '{env_id}' ({entry.value}) cannot be loaded: {one_line(error)}") from error


def _check_params(env_id: str, params: Params, defaults: Mapping[str, Any]) -> None:
    for name, value in params.items():
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(defaults) or 'none'}"
            raise UserError(f"{env_id} has no parameter '{name}': {hint}")
        wanted = type(defaults[name])
        if wanted in (bool, int, str) and type(value) is not wanted:
            raise UserError(f"{env_id}: parameter '{name}' must be of type {wanted.__name__}, got {value!r}")
