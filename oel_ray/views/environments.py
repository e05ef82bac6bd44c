"""`oel envs`: which environments there are, and what one of them is like. Runs in the command line's process."""

import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from oel_ray.config.schema import EnvironmentConfig
from oel_ray.envs.baselines import oracle_rate, random_rate
from oel_ray.envs.registry import known_ids, make, parameters, registered
from oel_ray.envs.splits import episode
from oel_ray.errors import UserError
from oel_ray.records import Episode
from oel_ray.views.terminal import plain

_SEEDS = 64
_RANDOM_GAMES = 8
_PATIENCE_S = 10.0


class Entry(NamedTuple):
    """An environment that can be named. `obstacle` says why it cannot be played here, "" if it can."""

    env_id: str
    source: str
    parameters: Mapping[str, Any] | None
    obstacle: str


class Facts(NamedTuple):
    """What is measured of an environment: distinct maps among the first seeds, and pass rates on some of them."""

    seeds: int
    maps: int
    measured: int
    random: float | None
    oracle: float | None


def catalog() -> list[Entry]:
    """Every environment, registered ones first. Builds none and downloads nothing."""
    return [_entry(env_id) for env_id in known_ids()]


def catalog_table() -> Table:
    """A row per environment: its parameters with their defaults, or why it cannot be played here."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("id", no_wrap=True)
    table.add_column("parameters, or why it cannot be played here")
    source = ""
    for entry in catalog():
        if entry.source != source:
            source = entry.source
            table.add_section()
            table.add_row(Text(source, "bold"), "")
        told = plain(entry.obstacle, "red") if entry.obstacle else plain(_listed(entry.parameters))
        table.add_row(plain(entry.env_id), told)
    return table


def description(env: EnvironmentConfig) -> RenderableType:
    """Parameters, a game's first texts, and what is measured.

    Raises:
        UserError: there is no such environment, or it cannot be built with these parameters.
    """
    game = make(env.id, 0, env.params)
    defaults = parameters(env.id)
    values = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False)
    for name in ("parameter", "value", "default"):
        values.add_column(name)
    for name in {**(defaults or {}), **env.params}:
        default = _yaml(defaults[name]) if defaults else "?"
        values.add_row(plain(name), plain(_yaml(env.params[name]) if name in env.params else default), plain(default))
    return Group(
        plain(f"{env.id}, from {_source(env.id)}", "bold"),
        values if values.rows else plain(f"parameters: {_listed(defaults)}"),
        Rule("instructions", align="left", style="dim"),
        plain(game.instructions),
        Rule("first text, seed 0", align="left", style="dim"),
        plain(game.reset() or "(none)"),
        Rule(f"measured with {env.max_turns} turns", align="left", style="dim"),
        _measured(facts(env)),
    )


def facts(env: EnvironmentConfig) -> Facts:
    """Look at the first seeds and let the random and the perfect player play; less of both where building is slow."""
    began = time.monotonic()
    episodes: dict[str, Episode] = {}
    seeds = 0
    while seeds < _SEEDS and time.monotonic() - began < _PATIENCE_S:
        map_hash = make(env.id, seeds, env.params).map_hash
        episodes.setdefault(map_hash, episode(f"s{seeds}", 0, "held_out", env, seeds, map_hash))
        seeds += 1
    build_s = (time.monotonic() - began) / seeds
    measured = [*episodes.values()][: max(1, int(_PATIENCE_S / build_s / (_RANDOM_GAMES + 1)))]
    return Facts(
        seeds=seeds,
        maps=len(episodes),
        measured=len(measured),
        random=random_rate(measured, env.max_turns, _RANDOM_GAMES, 0),
        oracle=oracle_rate(measured, env.max_turns),
    )


def _measured(found: Facts) -> Table:
    on = f"on {found.measured} maps"
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    random = "none: the environment lists no actions"
    if found.random is not None:
        random = f"{found.random:.1%} won {on}, {_RANDOM_GAMES} games each"
    perfect = "none: the environment tells no solution" if found.oracle is None else f"{found.oracle:.1%} won {on}"
    table.add_row("distinct maps", f"{found.maps} among {found.seeds} seeds")
    table.add_row("random player", random)
    table.add_row("perfect player", perfect)
    return table


def _entry(env_id: str) -> Entry:
    try:
        return Entry(env_id, _source(env_id), parameters(env_id), "")
    except UserError as error:
        return Entry(env_id, _source(env_id), None, str(error).removeprefix(env_id).lstrip())


def _source(env_id: str) -> str:
    """The package that an environment comes from."""
    entry = registered().get(env_id)
    if entry is None:
        return "TextArena"
    return entry.dist.name if entry.dist else entry.value


def _listed(defaults: Mapping[str, Any] | None) -> str:
    if defaults is None:
        return "(its package does not tell)"
    return " ".join(f"{name}={_yaml(value)}" for name, value in defaults.items()) or "none"


def _yaml(value: Any) -> str:
    """A value as it is written on the command line: JSON is YAML."""
    return json.dumps(value, default=str, ensure_ascii=False)
