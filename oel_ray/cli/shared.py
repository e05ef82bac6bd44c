"""What several commands have in common: arguments, reading CONFIG, ending with one line."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from oel_ray.config.load import load_config, preset_names
from oel_ray.config.schema import RunConfig
from oel_ray.errors import UserError

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changed settings, e.g. rounds=3 collect.seats=8.")
]
Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A preset or a YAML file.")]
NewConfig = Annotated[
    str | None, typer.Option(metavar="CONFIG", help="Start a new run in RUN_DIR from a preset or a YAML file.")
]
Round = Annotated[int | None, typer.Option("--round", min=0, help="The round.  [the first that lacks this stage]")]
Parameters = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Parameters of the environment, e.g. size=3.")
]
MaxBad = Annotated[float, typer.Option(min=0, max=1, help="Share of bad lines of FILE that may be left out.")]
MayChange = Annotated[bool, typer.Option("--allow-config-change", help="Resume with another CONFIG or changed model.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")]


def load(config: str, overrides: list[str] | None) -> RunConfig:
    """Read CONFIG with its overrides.

    Raises:
        UserError: it cannot be read, or says what no run can do.
    """
    if "=" in config and not Path(config).is_file():
        raise UserError(f"CONFIG comes before '{config}': a YAML file or a preset: {', '.join(preset_names())}")
    return load_config(config, overrides)


def end(code: int, message: str) -> NoReturn:
    """End the process with a code and one line on stderr."""
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
