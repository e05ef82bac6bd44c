"""The commands about configuration, machine, models and environments."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from oel_ray.cli.shared import Config, Overrides, Parameters, end, load
from oel_ray.config.load import parse_config, parse_override
from oel_ray.config.schema import EnvironmentConfig
from oel_ray.errors import UserError
from oel_ray.telemetry.progress import Progress
from oel_ray.views.terminal import plain

TURNS = EnvironmentConfig.model_fields["max_turns"].default


def config(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved configuration, and as comments what follows from it."""
    from oel_ray.config.precision import auto_here
    from oel_ray.views.explain import explain

    settings = load(config, overrides)
    print(settings.to_yaml(), end="")
    print(*(f"# {line}" for line in explain(settings, auto_here())), sep="\n")


def doctor(
    config: Config = "quickstart",
    overrides: Overrides = None,
    run_dir: Annotated[Path, typer.Option(help="Where runs are going to be.")] = Path("runs"),
) -> None:
    """Look for what would make a run fail, on this machine or on every node of the cluster.

    Each finding says what to do; exit code 1 if one of them would stop a run.
    """
    from rich.table import Table

    from oel_ray.cluster.doctor import examine, package

    found = [*examine(load(config, overrides), run_dir, Progress().note), *package(config)]
    table = Table("where", "", "what is wrong, and what to do", box=None)
    for where, what, is_error in found:
        table.add_row(where, "error" if is_error else "note", plain(what))
    Console().print(table if found else "nothing was found that would make a run fail")
    if any(finding.is_error for finding in found):
        end(1, "oel: a run would fail here")


def prefetch(config: Config, overrides: Overrides = None) -> None:
    """Fetch a configuration's models into the hub's cache, once for all nodes that share it.

    Runs find them there and need no network.
    """
    from oel_ray.models.resolve import prefetch as fetch

    settings = load(config, overrides)
    for model in filter(None, [settings.model, settings.consolidate.teacher]):
        print(fetch(model, Progress().note))


def envs(
    env_id: Annotated[str | None, typer.Argument(metavar="ID", help="An environment to look at; else all.")] = None,
    params: Parameters = None,
    turns: Annotated[int | None, typer.Option(min=1, help=f"Responses per game.  [{TURNS}]")] = None,
) -> None:
    """List what can be played.

    With an ID: its parameters, a first text, distinct maps, and how far a random and a perfect player get.
    """
    from oel_ray.views.environments import catalog_table, description

    Console().print(catalog_table() if env_id is None else description(_environment(env_id, params, turns)))


def check_env(
    env_id: Annotated[str, typer.Argument(metavar="ID", help="A name that an installed package registers.")],
    params: Parameters = None,
) -> None:
    """Check the rules that an environment must keep.

    Prints a line per broken rule with what to do; exit code 1 if there is one. Notes alone do not fail.
    """
    from oel_ray.envs.check import RULES, check_environment

    env = _environment(env_id, params)
    findings = check_environment(env.id, env.params)
    for finding in findings:
        print(finding)
    if broken := [finding for finding in findings if not finding.is_note]:
        end(1, f"oel: {env_id} breaks {len(broken)} of {len(RULES)} rules")
    print(f"{env_id} can be played; checked: {', '.join(RULES)}")


def _environment(env_id: str, params: list[str] | None, turns: int | None = None) -> EnvironmentConfig:
    if "=" in env_id:
        raise UserError(f"ID comes before '{env_id}': oel envs lists the environments")
    values = {"id": env_id, "params": dict(map(parse_override, params or []))}
    return parse_config({"env": values if turns is None else {**values, "max_turns": turns}}).env
