"""The command line. The process that runs it becomes the driver of a run.

Heavy imports stay inside the commands: `oel --help` needs neither Ray nor torch nor vLLM. Exit codes: 2 for a mistake
that a person can mend, 1 for a failed run, 130 for an interrupted one, each with one line on stderr.
"""

import sys
from typing import NoReturn

import typer

from oel_ray.cli import machine, reading, training
from oel_ray.cli.shared import end
from oel_ray.errors import UserError

app = typer.Typer(
    name="oel",
    help="Online Experiential Learning on Ray: a language-model agent that learns from the text it meets in use.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (
    *(training.run, training.submit, training.collect, training.extract, training.consolidate, training.evaluate),
    *(reading.show, reading.knowledge, reading.rollback, reading.report, reading.verify),
    *(machine.config, machine.doctor, machine.prefetch, machine.envs, machine.check_env),
):
    app.command()(command)


def main() -> NoReturn:
    """Run the command that was typed."""
    try:
        sys.exit(app(standalone_mode=False))
    except UserError as error:
        end(2, f"oel: error: {error}")
    except typer.TyperException as error:
        end(2, f"oel: error: {error.format_message()} (see --help)")
    except (KeyboardInterrupt, typer.Abort):
        end(130, "oel: interrupted")
