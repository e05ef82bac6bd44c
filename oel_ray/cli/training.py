"""The commands that work: a whole run, a job, or one stage."""

import os
import shlex
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from oel_ray.cli.shared import MaxBad, MayChange, NewConfig, Overrides, Round, RunDir, end, load
from oel_ray.config.load import preset_names
from oel_ray.errors import RunFailed, UserError
from oel_ray.records import TrainingSplit
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.layout import RUN_FILE
from oel_ray.telemetry.progress import Progress
from oel_ray.views.show import next_steps, summary_table


def run(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A preset or a YAML file; not needed with --resume.")
    ] = None,
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="The run folder.  [runs/CONFIG-TIME]")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --run-dir; with CONFIG, start it if there is none.")
    ] = False,
    allow_config_change: MayChange = False,
) -> None:
    """Run a configuration, round after round.

    A round collects games, extracts knowledge, consolidates it into the policy and evaluates. Stages that are done
    are never done again.
    """
    from oel_ray.preflight import preflight, preflight_resumed
    from oel_ray.views.explain import headline

    if allow_config_change and not resume:
        raise UserError("--allow-config-change is for a run that goes on: add --resume, or leave it out")
    if resume and run_dir is None:
        raise UserError("--resume needs the folder of the run: --run-dir RUN_DIR")
    if config is None and not resume:
        raise UserError(f"give a CONFIG, a YAML file or a preset: {', '.join(preset_names())}")
    settings = load(config, overrides) if config else None
    path = run_dir or Path("runs", f"{Path(str(config)).stem}-{datetime.now():%Y%m%d-%H%M%S}")
    note = Progress().note
    if resume and not (settings and not (path / RUN_FILE).exists()):
        preflight_resumed(RunFolder.open_to_resume(path, settings, allow_change=allow_config_change), note)
        folder = RunFolder.resume(path, settings, allow_change=allow_config_change)
    else:
        assert settings is not None
        RunFolder.check_new(path)
        folder = RunFolder.create(path, settings, preflight(settings, note).auto)
    note(headline(folder.config))

    def work() -> None:
        from oel_ray import loop

        loop.run(folder.config, folder, Progress(folder))

    _work(folder, path, work)
    Console().print(summary_table(path))
    print(f"\n{next_steps(path)}")


def submit(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A preset or a YAML file.")],
    overrides: Overrides = None,
    *,
    name: Annotated[str, typer.Option(help="Of the run: submitted again under its name, it goes on where it was.")],
    address: Annotated[
        str, typer.Option(envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"], help="Of the cluster's dashboard.")
    ] = "http://127.0.0.1:8265",
    runs: Annotated[
        Path, typer.Option(envvar="OEL_RAY_RUNS", help="Where runs lie, on storage that all nodes share.")
    ] = Path("/mnt/oel/runs"),
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Print what the job prints.")] = True,
) -> None:
    """Run a configuration as a job of a Ray cluster.

    A YAML file's folder goes with the job. Ends with the job's exit code; Ctrl-C ends the following alone.
    """
    from oel_ray.cluster import submit as jobs

    load(config, overrides)
    job = jobs.plan_job(name, config, overrides or [], runs, os.environ)
    client, job_id = jobs.submit(job, address)
    it = f"{job_id} --address {address}"
    rest = f"follow it with 'ray job logs -f {it}', stop it with 'ray job stop {it}'"
    print(f"job {job_id}: {job.entrypoint}; {rest}; with {', '.join(job.runtime_env['env_vars'])}", file=sys.stderr)
    try:
        code = jobs.follow(client, job_id) if follow else 0
    except KeyboardInterrupt:
        end(130, f"oel: the job {job_id} goes on: {rest}")
    except RunFailed as failure:
        end(1, f"oel: {failure}")
    if code:
        end(code, f"oel: the job {job_id} ended with exit code {code}")


def collect(run_dir: RunDir, overrides: Overrides = None, config: NewConfig = None, number: Round = None) -> None:
    """Play the games of one round.

    They are those that extract reads, and those that consolidate takes its prefixes from.
    """
    _one_stage(run_dir, config, overrides, number, "collect")


def extract(
    run_dir: RunDir,
    overrides: Overrides = None,
    config: NewConfig = None,
    number: Round = None,
    trajectories: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSONL of games to read, instead of collected ones.")
    ] = None,
    max_bad: MaxBad = 0.01,
) -> None:
    """Turn the games of one round into knowledge.

    With --trajectories the games come from a file: one JSON object a line, with "instructions" and "turns", a turn with
    "observation" and "response".
    """
    _one_stage(run_dir, config, overrides, number, "extract", {"extraction": trajectories}, max_bad=max_bad)


def consolidate(
    run_dir: RunDir,
    overrides: Overrides = None,
    config: NewConfig = None,
    number: Round = None,
    trajectories: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSONL of games to take prefixes from, instead of collected ones."),
    ] = None,
    max_bad: MaxBad = 0.01,
    knowledge: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A knowledge text, .json of a run or plain text; may be repeated."),
    ] = None,
) -> None:
    """Distil knowledge into the weights.

    Reads the games and the knowledge of one round, or of files, and writes the round's policy.
    """
    _one_stage(run_dir, config, overrides, number, "consolidate", {"consolidation": trajectories}, knowledge, max_bad)


def evaluate(
    run_dir: RunDir,
    overrides: Overrides = None,
    config: NewConfig = None,
    number: Round = None,
    in_context: Annotated[
        bool, typer.Option("--in-context", help="Play with the round's knowledge in the prompt, before consolidation.")
    ] = False,
    knowledge: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="With --in-context: a knowledge text from elsewhere; may be repeated."),
    ] = None,
) -> None:
    """Play the held-out maps.

    The policy is the one that the round ended with; round 0 is the untouched model.
    """
    if knowledge and not in_context:
        raise UserError("--knowledge is read with --in-context only: add it, or leave --knowledge out")
    stage = "evaluate_in_context" if in_context else "evaluate"
    _one_stage(run_dir, config, overrides, number, stage, knowledge=knowledge)


def _one_stage(
    run_dir: Path,
    config: str | None,
    overrides: list[str] | None,
    number: int | None,
    name: str,
    trajectories: dict[TrainingSplit, Path | None] | None = None,
    knowledge: list[Path] | None = None,
    max_bad: float = 0.0,
) -> None:
    """Do one stage of one round, in an existing run or in a new one."""
    from oel_ray.cli.stage import plan_stage

    if overrides and config is None:
        raise UserError(f"'{overrides[0]}' changes a configuration: name one with --config to start a new run")
    settings = load(config, overrides) if config else None
    games = {split: path for split, path in (trajectories or {}).items() if path}
    stage = plan_stage(run_dir, settings, name, number, games, knowledge or [], max_bad, Progress().note)
    folder = stage.open()
    _work(folder, run_dir, lambda: stage.work(folder, Progress(folder)))
    print(next_steps(run_dir))


def _work(folder: RunFolder, path: Path, work: Callable[[], None]) -> None:
    """Do the work of a run; ends the process with the right code where that does not come to its end."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
    again = f"oel run --resume --run-dir {shlex.quote(str(path))}"
    try:
        with folder:
            work()
    except (KeyboardInterrupt, SystemExit):  # Ray puts a SIGTERM handler of its own in place, which exits
        end(130, f"oel: interrupted: the run is in {path}; go on with: {again}")
    except RunFailed as failure:
        end(1, f"oel: run failed: {failure}; the run is in {path}; go on with: {again}")
