"""From an environment's name to an environment. Runs wherever environments run.

A package adds environments with entry points of the group `oel_ray.environments`: a name, and a factory
`(seed: int, params: dict) -> Environment`. Every other name is a TextArena id; TextArena is imported when one is asked
for.
"""

import difflib
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from oel_ray.envs.base import Environment
from oel_ray.errors import UserError, one_line
from oel_ray.records import Params

GROUP = "oel_ray.environments"


def make(env_id: str, seed: int, params: Params) -> Environment:
    """Build one game.

    Raises:
        UserError: the name is unknown, or the environment cannot be built with these parameters.
    """
    entry = registered().get(env_id)
    if entry is None:
        return _make_textarena(env_id, seed, params)
    try:
        environment: Environment = entry.load()(seed, dict(params))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"environment '{env_id}' ({entry.value}) cannot be built with {params}: {one_line(error)}"
        ) from error
    return environment


def known_ids() -> list[str]:
    """Every name that `make` takes: registered ones first, then TextArena's single-player games."""
    from oel_ray.envs.textarena import single_player_ids

    return [*sorted(registered()), *(name for name in single_player_ids() if name not in registered())]


@lru_cache(maxsize=1)
def registered() -> dict[str, EntryPoint]:
    """The environments of installed packages. Read once: looking through all packages takes milliseconds."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _make_textarena(env_id: str, seed: int, params: Params) -> Environment:
    from oel_ray.envs.textarena import TextArenaEnvironment, single_player_ids

    if env_id not in single_player_ids():
        near = difflib.get_close_matches(env_id, known_ids(), n=1, cutoff=0.3)
        hint = f": did you mean '{near[0]}'?" if near else ""
        raise UserError(f"no single-player environment is called '{env_id}'{hint}")
    return TextArenaEnvironment(env_id, seed, params)
