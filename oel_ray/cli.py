"""The command line. The process that runs it becomes the driver of a run.

Heavy imports stay inside the commands: `oel --help` needs neither Ray nor torch nor vLLM. Exit codes: 2 for a mistake
that a person can mend, 1 for a failed run, 130 for an interrupted one, each with one line on stderr.
"""

import shlex
import signal
import sys
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from oel_ray.config import RunConfig
from oel_ray.configure import load_config, preset_names
from oel_ray.errors import RunFailed, UserError

app = typer.Typer(
    name="oel",
    help="Online Experiential Learning on Ray: a language-model agent that learns from the text it meets in use.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changed settings, e.g. rounds=3 collect.seats=8.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")]


@app.command()
def run(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A preset or a YAML file; not needed with --resume.")
    ] = None,
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="The run folder.  [runs/CONFIG-TIME]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --run-dir.")] = False,
) -> None:
    """Run a configuration, round after round.

    A round collects games, extracts knowledge, consolidates it into the policy and evaluates. Stages that are done
    are never done again.
    """
    from rich.console import Console

    from oel_ray.plan import headline
    from oel_ray.preflight import preflight, preflight_resumed
    from oel_ray.progress import Progress
    from oel_ray.runs import RunFolder
    from oel_ray.show import next_steps, summary_table

    if resume and run_dir is None:
        raise UserError("--resume needs the folder of the run: --run-dir RUN_DIR")
    if config is None and not resume:
        raise UserError(f"give a CONFIG, a YAML file or a preset: {', '.join(preset_names())}")
    settings = _load(config, overrides) if config else None
    path = run_dir or _default_run_dir(str(config))
    note = Progress().note
    if resume:
        preflight_resumed(RunFolder.open_to_resume(path, settings), note)
        folder = RunFolder.resume(path, settings)
    else:
        assert settings is not None
        RunFolder.check_new(path)
        preflight(settings, note)
        folder = RunFolder.create(path, settings)
    note(headline(folder.config))

    signal.signal(signal.SIGTERM, _interrupt)
    again = f"oel run --resume --run-dir {shlex.quote(str(path))}"
    try:
        with folder:
            from oel_ray import loop

            loop.run(folder.config, folder, Progress(folder))
    except (KeyboardInterrupt, SystemExit):  # Ray puts a SIGTERM handler of its own in place, which exits
        _end(130, f"oel: interrupted: the run is in {path}; go on with: {again}")
    except RunFailed as failure:
        _end(1, f"oel: run failed: {failure}; the run is in {path}; go on with: {again}")
    console = Console()
    console.print(summary_table(path))
    print(f"\n{next_steps(path)}")


@app.command()
def show(
    run_dir: RunDir,
    identifier: Annotated[
        str | None, typer.Argument(metavar="ID", help="A trajectory or a knowledge text, e.g. r001-k00.")
    ] = None,
) -> None:
    """Read a run, a game or a knowledge text."""
    from rich.console import Console

    from oel_ray.show import show as show_run

    show_run(run_dir, identifier, Console())


@app.command()
def verify(
    run_dir: RunDir,
    replay: Annotated[bool, typer.Option("--replay", help="Also play every evaluation game again.")] = False,
) -> None:
    """Check what a run folder promises.

    Prints a line per broken promise, with file and line; exit code 1 if there is one.
    """
    from oel_ray.verify import Replay
    from oel_ray.verify import verify as verify_run

    play: Replay | None = None
    if replay:
        from oel_ray.envs.replay import replay as play_again

        play = play_again
    findings = verify_run(run_dir, play)
    for finding in findings:
        print(finding)
    if findings:
        _end(1, f"oel: {run_dir}: {len(findings)} broken promises")
    print(f"{run_dir}: every promise holds{', every game replayed' if replay else ''}")


@app.command("config")
def show_config(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A preset or a YAML file.")],
    overrides: Overrides = None,
) -> None:
    """Print the resolved configuration, and as comments what follows from it."""
    from oel_ray.plan import explain

    settings = _load(config, overrides)
    print(settings.to_yaml(), end="")
    print(*(f"# {line}" for line in explain(settings)), sep="\n")


def main() -> NoReturn:
    """The console entry `oel`."""
    try:
        sys.exit(app(standalone_mode=False))
    except UserError as error:
        _end(2, f"oel: error: {error}")
    except typer.TyperException as error:
        _end(2, f"oel: error: {error.format_message()} (see --help)")
    except KeyboardInterrupt:
        _end(130, "oel: interrupted")


def _load(config: str, overrides: list[str] | None) -> RunConfig:
    if "=" in config and not Path(config).is_file():
        raise UserError(f"CONFIG comes before '{config}': a YAML file or a preset: {', '.join(preset_names())}")
    return load_config(config, overrides)


def _default_run_dir(config: str) -> Path:
    return Path("runs") / f"{Path(config).stem}-{datetime.now():%Y%m%d-%H%M%S}"


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _end(code: int, message: str) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
