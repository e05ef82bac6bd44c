"""The command line. The process that runs it becomes the driver of a run.

Heavy imports stay inside the commands: `oel --help` needs neither Ray nor torch nor vLLM. Exit codes: 2 for a mistake
that a person can mend, 1 for a failed run, 130 for an interrupted one, each with one line on stderr.
"""

import os
import shlex
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from oel_ray.config.load import load_config, parse_config, parse_override, preset_names
from oel_ray.config.schema import EnvironmentConfig, RunConfig
from oel_ray.errors import RunFailed, UserError
from oel_ray.records import TrainingSplit
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.layout import RUN_FILE
from oel_ray.telemetry.progress import Progress
from oel_ray.views.show import next_steps, remarks, summary_table
from oel_ray.views.terminal import plain

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


@app.command()
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
    settings = _load(config, overrides) if config else None
    path = run_dir or _default_run_dir(str(config))
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


@app.command()
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

    _load(config, overrides)
    job = jobs.plan_job(name, config, overrides or [], runs, os.environ)
    client, job_id = jobs.submit(job, address)
    it = f"{job_id} --address {address}"
    rest = f"follow it with 'ray job logs -f {it}', stop it with 'ray job stop {it}'"
    print(f"job {job_id}: {job.entrypoint}; {rest}; with {', '.join(job.runtime_env['env_vars'])}", file=sys.stderr)
    try:
        code = jobs.follow(client, job_id) if follow else 0
    except KeyboardInterrupt:
        _end(130, f"oel: the job {job_id} goes on: {rest}")
    except RunFailed as failure:
        _end(1, f"oel: {failure}")
    if code:
        _end(code, f"oel: the job {job_id} ended with exit code {code}")


@app.command()
def collect(run_dir: RunDir, overrides: Overrides = None, config: NewConfig = None, number: Round = None) -> None:
    """Play the games of one round.

    They are those that extract reads, and those that consolidate takes its prefixes from.
    """
    _one_stage(run_dir, config, overrides, number, "collect")


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def show(
    run_dir: RunDir,
    identifier: Annotated[
        str | None, typer.Argument(metavar="ID", help="A trajectory or a knowledge text, e.g. r001-k00.")
    ] = None,
) -> None:
    """Read a run, a game or a knowledge text."""
    from oel_ray.views.show import show as show_run

    show_run(run_dir, identifier, Console())


@app.command()
def knowledge(
    run_dir: RunDir,
    diff: Annotated[tuple[str, str] | None, typer.Option(metavar="ID ID", help="Compare two knowledge texts.")] = None,
    drop: Annotated[
        str | None, typer.Option(metavar="GAME", help="Take back what this game taught, and all that was made of it.")
    ] = None,
) -> None:
    """List what a run has learned, with how much was rejected and why.

    After --drop, 'oel run --resume' does again what learned from that game; the old files stay in the quarantine.
    """
    from oel_ray.runs import takeback
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


@app.command()
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
    behind = [number for number in folder.rounds() if number > to_round]
    if not behind:
        raise UserError(f"{run_dir} has no round behind round {to_round}: choose an earlier one with --to-round")
    start = f"round {to_round + 1} then starts anew, from the policy of round {folder.deployed(to_round + 1)}"
    print(f"rounds {behind[0]} to {behind[-1]} leave the run for {run_dir / 'quarantine'}; {start}")
    if not yes:
        typer.confirm("Go on?", abort=True)
    with RunFolder.take(run_dir) as folder:
        folder.set_aside([folder.files(number).root for number in behind[::-1]])


@app.command()
def report(
    run_dir: RunDir,
    out: Annotated[Path | None, typer.Option(help="Where to write it.  [RUN_DIR/report]")] = None,
) -> None:
    """Write a page about a run, with its figures: one HTML file that needs no network, and PNGs."""
    from oel_ray.views.report.page import write_report

    print(write_report(run_dir, out))


@app.command()
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
        _end(1, f"oel: {run_dir}: {len(findings)} broken promises")
    print(f"{run_dir}: every promise holds{', every game replayed' if replay else ''}", *remarks(run_dir), sep="\n")


@app.command("config")
def show_config(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved configuration, and as comments what follows from it."""
    from oel_ray.config.precision import auto_here
    from oel_ray.views.explain import explain

    settings = _load(config, overrides)
    print(settings.to_yaml(), end="")
    print(*(f"# {line}" for line in explain(settings, auto_here())), sep="\n")


@app.command()
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

    found = [*examine(_load(config, overrides), run_dir, Progress().note), *package(config)]
    table = Table("where", "", "what is wrong, and what to do", box=None)
    for where, what, is_error in found:
        table.add_row(where, "error" if is_error else "note", plain(what))
    Console().print(table if found else "nothing was found that would make a run fail")
    if any(finding.is_error for finding in found):
        _end(1, "oel: a run would fail here")


@app.command()
def prefetch(config: Config, overrides: Overrides = None) -> None:
    """Fetch a configuration's models into the hub's cache, once for all nodes that share it.

    Runs find them there and need no network.
    """
    from oel_ray.models.resolve import prefetch as fetch

    settings = _load(config, overrides)
    for model in filter(None, [settings.model, settings.consolidate.teacher]):
        print(fetch(model, Progress().note))


@app.command()
def envs(
    env_id: Annotated[str | None, typer.Argument(metavar="ID", help="An environment to look at; else all.")] = None,
    params: Parameters = None,
    turns: Annotated[int | None, typer.Option(min=1, help="Responses per game.  [as configured: 5]")] = None,
) -> None:
    """List what can be played.

    With an ID: its parameters, a first text, distinct maps, and how far a random and a perfect player get.
    """
    from oel_ray.views.environments import catalog_table, description

    Console().print(catalog_table() if env_id is None else description(_environment(env_id, params, turns)))


@app.command()
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
        _end(1, f"oel: {env_id} breaks {len(broken)} of {len(RULES)} rules")
    print(f"{env_id} can be played; checked: {', '.join(RULES)}")


def main() -> NoReturn:
    """The console entry `oel`."""
    try:
        sys.exit(app(standalone_mode=False))
    except UserError as error:
        _end(2, f"oel: error: {error}")
    except typer.TyperException as error:
        _end(2, f"oel: error: {error.format_message()} (see --help)")
    except (KeyboardInterrupt, typer.Abort):
        _end(130, "oel: interrupted")


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
    from oel_ray.single import Files, plan_stage

    if overrides and config is None:
        raise UserError(f"'{overrides[0]}' changes a configuration: name one with --config to start a new run")
    settings = _load(config, overrides) if config else None
    files = Files({split: path for split, path in (trajectories or {}).items() if path}, knowledge or [], max_bad)
    stage = plan_stage(run_dir, settings, name, number, files, Progress().note)
    folder = stage.open()
    _work(folder, run_dir, lambda: stage.work(folder, Progress(folder)))
    print(next_steps(run_dir))


def _work(folder: RunFolder, path: Path, work: Callable[[], None]) -> None:
    """Do the work of a run; ends the process with the right code where that does not come to its end."""
    signal.signal(signal.SIGTERM, _interrupt)
    again = f"oel run --resume --run-dir {shlex.quote(str(path))}"
    try:
        with folder:
            work()
    except (KeyboardInterrupt, SystemExit):  # Ray puts a SIGTERM handler of its own in place, which exits
        _end(130, f"oel: interrupted: the run is in {path}; go on with: {again}")
    except RunFailed as failure:
        _end(1, f"oel: run failed: {failure}; the run is in {path}; go on with: {again}")


def _load(config: str, overrides: list[str] | None) -> RunConfig:
    if "=" in config and not Path(config).is_file():
        raise UserError(f"CONFIG comes before '{config}': a YAML file or a preset: {', '.join(preset_names())}")
    return load_config(config, overrides)


def _environment(env_id: str, params: list[str] | None, turns: int | None = None) -> EnvironmentConfig:
    if "=" in env_id:
        raise UserError(f"ID comes before '{env_id}': oel envs lists the environments")
    values = {"id": env_id, "params": dict(map(parse_override, params or []))}
    return parse_config({"env": values if turns is None else {**values, "max_turns": turns}}).env


def _default_run_dir(config: str) -> Path:
    return Path("runs") / f"{Path(config).stem}-{datetime.now():%Y%m%d-%H%M%S}"


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _end(code: int, message: str) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
