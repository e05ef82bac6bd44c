"""The commands that read a run folder, or take back a part of it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from oel_ray.cli.shared import RunDir, end
from oel_ray.runs import takeback
from oel_ray.runs.folder import RunFolder
from oel_ray.views.show import remarks
from oel_ray.views.terminal import plain


def show(
    run_dir: RunDir,
    identifier: Annotated[
        str | None, typer.Argument(metavar="ID", help="A trajectory or a knowledge text, e.g. r001-k00.")
    ] = None,
) -> None:
    """Read a run, a game or a knowledge text."""
    from oel_ray.views.show import show as show_run

    show_run(run_dir, identifier, Console())


def knowledge(
    run_dir: RunDir,
    diff: Annotated[tuple[str, str] | None, typer.Option(metavar="ID ID", help="Compare two knowledge texts.")] = None,
    drop: Annotated[
        str | None, typer.Option(metavar="GAME", help="Take back what this game taught, and all that was made of it.")
    ] = None,
) -> None:
    """List what a run has learned, with how much was rejected and why.

    After --drop, 'oel run --resume' does again what learned from that game. What had been made of it goes to the
    quarantine.
    """
    from oel_ray.views import knowledge as learned

    lines = learned.difference(RunFolder.open(run_dir), *diff) if diff else learned.listing(RunFolder.open(run_dir))
    if drop:
        from oel_ray.text.chat import ChatFormat

        takeback.taught_by(RunFolder.open(run_dir), drop)
        with RunFolder.resume(run_dir, None) as folder:
            thinking, frame = folder.config.thinking, folder.frame
            chat = ChatFormat.from_pretrained(folder.policy(0), thinking=thinking, frame=frame)
            lines = [f"to be done again: {stage}" for stage in takeback.drop(folder, drop, chat.count)]
    print(*(plain(line).plain for line in lines), sep="\n")


def rollback(
    run_dir: RunDir,
    to_round: Annotated[int, typer.Option("--to-round", min=0, help="The last round that stays.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Take back the rounds behind one; 'oel run --resume' does them again.

    Their files move to the quarantine. The policy that the next round starts from is that of the last round that stays,
    or an older one if the gate kept it.
    """
    folder = RunFolder.open(run_dir)
    behind = takeback.rounds_after(folder, to_round)
    start = f"round {to_round + 1} then starts anew, from the policy of round {folder.deployed(to_round + 1)}"
    print(f"rounds {behind[0]} to {behind[-1]} leave the run for {run_dir / 'quarantine'}; {start}")
    if not yes:
        typer.confirm("Go on?", abort=True)
    takeback.roll_back(run_dir, behind)


def report(
    run_dir: RunDir,
    out: Annotated[Path | None, typer.Option(help="Where to write it.  [RUN_DIR/report]")] = None,
) -> None:
    """Write a page about a run, with its figures: one HTML file that needs no network, and PNGs."""
    from oel_ray.views.report.page import write_report

    print(write_report(run_dir, out))


def verify(
    run_dir: RunDir,
    replay: Annotated[bool, typer.Option("--replay", help="Also play every evaluation game again.")] = False,
) -> None:
    """Check what a run folder promises.

    Prints a line per broken promise, with file and line; exit code 1 if there is one.
    """
    from oel_ray.envs.replay import replay as play_again
    from oel_ray.views.verify import verify as verify_run

    findings = verify_run(run_dir, play_again if replay else None)
    if findings:
        print(*findings, sep="\n")
        end(1, f"oel: {run_dir}: {len(findings)} broken promises")
    print(f"{run_dir}: every promise holds{', every game replayed' if replay else ''}", *remarks(run_dir), sep="\n")
