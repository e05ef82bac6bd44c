"""Makes the runs of an experiment and writes down what they came to. Runs in the process of that experiment.

Every run is an ordinary run folder, made by `oel` in a child process; what is there already is gone on with, so a kill
costs no more than it costs `oel run`. Recipes are shared: a run that two arms or experiments need is made once.
"""

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from experiments import ifeval, measure
from experiments.records import ROUND, Arm, ArmResult, Experiment, Import, Imported, Point, Recipe, Start
from oel_ray.config.schema import RunConfig
from oel_ray.errors import UserError
from oel_ray.models.resolve import MICRO
from oel_ray.records import KnowledgeText, Trajectory, content_hash, read_jsonl
from oel_ray.runs.files import write_atomically
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.layout import CONSOLIDATE, EVALUATE, EXTRACT, IMPORT_KNOWLEDGE, IMPORT_OF, RUN_FILE
from oel_ray.runs.schedule import Committed, is_done, unfinished
from oel_ray.views.explain import Sizes

OEL = (sys.executable, "-m", "oel_ray")
RESULTS = Path("experiments/results")
SECONDS = {"command": 30.0, "round": 20.0, "step": 5.0, "game": 0.1, "extraction": 0.1, "measure": 60.0}
"""About what the micro model takes on two cores that do nothing else, for the estimate of `--plan` alone."""

_STAGE_OF: dict[Imported, str] = dict(IMPORT_OF) | {"knowledge": IMPORT_KNOWLEDGE}


class Policy(NamedTuple):
    """A policy of a run: after a round, or inside it after so many steps."""

    round: int
    step: int | None

    @property
    def name(self) -> str:
        return f"r{self.round:03d}" + (f"-s{self.step:04d}" if self.step else "")

    def folder(self, run: RunFolder) -> Path:
        return run.policy(self.round) if self.step is None else run.files(self.round).policy_after(self.step)


class Work(NamedTuple):
    """How much there is to do. `commands` each start Ray and engines."""

    commands: int = 0
    rounds: int = 0
    games: int = 0
    extractions: int = 0
    steps: int = 0
    measures: int = 0

    def plus(self, other: "Work", times: int) -> "Work":
        return Work(*(ours + times * theirs for ours, theirs in zip(self, other, strict=True)))

    @property
    def minutes(self) -> float:
        """Of the micro model on two quiet cores."""
        names = ("command", "round", "game", "extraction", "step", "measure")
        return sum(SECONDS[name] * count for name, count in zip(names, self, strict=True)) / 60

    def __str__(self) -> str:
        parts = {"games": self.games, "extractions": self.extractions, "optimizer steps": self.steps}
        parts |= {"Ray starts": self.commands, "measurements without Ray": self.measures}
        return ", ".join(f"{count} {name}" for name, count in parts.items() if count)


def work_of_run(recipe: Recipe) -> Work:
    """A whole run, without those that it imports from."""
    config, sizes = recipe.config, Sizes.of(recipe.config)
    own, has = config.rounds, {item.what for item in recipe.imports}
    collected = own - bool(has)
    evaluations = (own + 1) * sizes.policy_games + own * sizes.in_context_games
    return Work(
        commands=1 + ("extraction" in has) + bool(has),
        rounds=own,
        games=collected * sizes.games + evaluations,
        extractions=(own - ("knowledge" in has)) * sizes.extractions,
        steps=own * config.consolidate.steps,
    )


def policies(config: RunConfig, rounds: int) -> list[Policy]:
    """Those inside and after the first rounds, in order, with the untouched one."""
    inside: list[int | None] = [*config.consolidate.keep_steps, None]
    return [Policy(0, None), *(Policy(number, step) for number in range(1, rounds + 1) for step in inside)]


def work_of_measures(experiment: Experiment, arm: Arm) -> Work:
    """What is measured of an arm's run behind it."""
    found, config = policies(arm.recipe.config, arm.rounds), arm.recipe.config
    kept = sum(policy.step is not None for policy in found) * experiment.by_step
    measures = len(found) * experiment.out_of_distribution
    return Work(commands=kept, games=kept * Sizes.of(config).policy_games, measures=measures)


def next_command(
    recipe: Recipe, seed: int, folder: Path, committed: Committed | None, files: Callable[[Import], Sequence[Path]]
) -> list[str] | None:
    """The arguments of `oel` that bring a run on; None if nothing is left.

    `committed` is None where there is no run yet. `files` says where what is imported lies.
    """
    settings = [*recipe.overrides, f"seed={seed}"]
    new = [*settings, "--config", recipe.preset] if committed is None else []
    done = set((committed or {}).get(ROUND, ()))
    given: dict[Imported, list[str]] = {"extraction": [], "consolidation": [], "knowledge": []}
    for item in recipe.imports:
        if _STAGE_OF[item.what] not in done:
            option = "--knowledge" if item.what == "knowledge" else "--trajectories"
            given[item.what] = [part for path in files(item) for part in (option, str(path))]
    where = [str(folder), *new, "--round", str(ROUND)]
    if any(item.what == "extraction" for item in recipe.imports) and not is_done(done, EXTRACT):
        return ["extract", *where, *given["extraction"]]
    if given["consolidation"] or given["knowledge"]:
        return [CONSOLIDATE, *where, *given["consolidation"], *given["knowledge"]]
    if committed is None:
        return ["run", recipe.preset, *settings, "--run-dir", str(folder)]
    config = recipe.config.model_copy(update={"seed": seed})
    return ["run", "--resume", "--run-dir", str(folder)] if unfinished(config, committed) else None


class Runs:
    """The runs of one preset below a folder. `oel` is the command that makes them."""

    def __init__(self, root: Path, oel: Sequence[str] = OEL) -> None:
        self.root = root
        self._oel = oel

    def folder(self, recipe: Recipe, seed: int) -> Path:
        return self.root / recipe.name / f"seed-{seed}"

    def is_made(self, recipe: Recipe, seed: int) -> bool:
        """Raises `UserError` where its folder holds a run of other settings."""
        return not next_command(recipe, seed, self.folder(recipe, seed), *self._state(recipe, seed))

    def made(self, recipe: Recipe, seed: int) -> RunFolder:
        """A finished run of the recipe; makes what is missing of it, and of those that it imports from.

        Raises:
            UserError: a folder holds a run of other settings, or one that took something else than now lies there.
        """
        for one in recipe.with_sources():
            while command := next_command(one, seed, self.folder(one, seed), *self._state(one, seed)):
                run_child([*self._oel, *command])
            self._check_imports(one, seed)
        return RunFolder.open(self.folder(recipe, seed))

    def played(self, recipe: Recipe, run: RunFolder, policy: Policy, seed: int) -> RunFolder:
        """A run that has done nothing but evaluate a policy that was kept inside a round of another."""
        path = self._beside(recipe, run, policy, seed, "played")
        if not (path / RUN_FILE).exists() or EVALUATE not in RunFolder.open(path).committed.get(0, ()):
            settings = [*recipe.overrides, f"seed={seed}", f"model={policy.folder(run)}", "--config", recipe.preset]
            run_child([*self._oel, EVALUATE, str(path), *settings, "--round", "0"])
        return RunFolder.open(path)

    def measured(self, recipe: Recipe, run: RunFolder, policy: Policy, seed: int) -> Path:
        """The file with what was measured of a policy outside its game."""
        is_micro = recipe.config.model == MICRO
        module = "worlds" if is_micro else "ifeval"
        path = self._beside(recipe, run, policy, seed, module) / "measured.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", f"experiments.{module}", str(policy.folder(run)), "--out", str(path)]
            run_child([*command, *(["--seed", str(seed)] if is_micro else [])])
        return path

    def _beside(self, recipe: Recipe, run: RunFolder, policy: Policy, seed: int, what: str) -> Path:
        """Where a measurement of a policy lies. One that was made anew, by the same run or another, is another one."""
        made = content_hash([entry.sha256 for entry in run.policy_files(policy.round).values()])
        return self.root / recipe.name / f"seed-{seed}-{what}" / f"{policy.name}-{made[:8]}"

    def _check_imports(self, recipe: Recipe, seed: int) -> None:
        """Runs that are compared have the same games or texts, which a run that was made anew has not."""
        path = self.folder(recipe, seed)
        for item in recipe.imports:
            ours = Import(source=recipe, round=ROUND, what=item.what)
            if _content(item.what, self._files(ours, seed)) != _content(item.what, self._files(item, seed)):
                source = self.folder(item.source, seed)
                raise UserError(f"{path} took {item.what} that is not what {source} has now: move {path} away")

    def _state(self, recipe: Recipe, seed: int) -> tuple[Committed | None, Callable[[Import], Sequence[Path]]]:
        path = self.folder(recipe, seed)
        if not (path / RUN_FILE).exists():
            return None, lambda item: self._files(item, seed)
        run = RunFolder.open(path)
        wanted = recipe.config.model_copy(update={"seed": seed}).settled(run.auto.precision)
        if run.config != wanted or run.info.get("changes"):
            raise UserError(f"{path} holds a run of other settings: choose another --out, or move it away")
        return run.committed, lambda item: self._files(item, seed)

    def _files(self, item: Import, seed: int) -> Sequence[Path]:
        files = RunFolder(self.folder(item.source, seed)).files(item.round)
        return files.knowledge_files() if item.what == "knowledge" else [files.trajectories(item.what)]


def _content(what: Imported, files: Sequence[Path]) -> list[list[str]]:
    """What an import takes over."""
    if what == "knowledge":
        return [[item.text for item in KnowledgeText.from_json(path.read_bytes()).items] for path in files]
    return [[turn.response for turn in game.turns] for path in files for game in read_jsonl(path, Trajectory)]


def result(experiment: Experiment, arm: Arm, start: Start, runs: Runs, seed: int, seeds: Sequence[int]) -> ArmResult:
    """Make what is missing of an arm with one of these seeds, and put its numbers together."""
    run = runs.made(arm.recipe, seed)
    found, steps = policies(run.config, arm.rounds), run.config.consolidate.steps
    points: list[Point] = [*measure.run_points(run, arm.rounds, runs.root)]
    for policy in found if experiment.by_step else []:
        if policy.step is not None:
            played = runs.played(arm.recipe, run, policy, seed)
            points.append(measure.kept_point(played, policy.round, policy.step, steps, runs.root))
    for policy in found if experiment.out_of_distribution else []:
        path = runs.measured(arm.recipe, run, policy, seed)
        points.append(measure.measured_point(path, policy.round, policy.step, steps, runs.root))
    untouched = measure.evaluation(run, 0)
    return ArmResult(
        experiment=experiment.name,
        arm=arm.label,
        preset=start.preset,
        settings=start.settings,
        arms=tuple(it.label for it in experiment.arms(start)),
        seeds=tuple(seeds),
        seed=seed,
        command=described(arm.recipe),
        run_id=run.info["run_id"],
        settings_hash=content_hash(run.config.model_dump(mode="json", exclude={"seed"})),
        model_hash=measure.model_hash(run),
        packages=run.info["packages"],
        machine=_machine(run.config),
        wall_s=measure.wall_seconds(run, arm.rounds),
        knowledge_tokens=measure.knowledge_tokens(run, arm.rounds),
        knowledge_hash=measure.knowledge_hash(run, arm.rounds),
        random=untouched.random,
        oracle=untouched.oracle,
        points=tuple(points),
    )


def check_there(experiment: Experiment, arms: Sequence[Arm]) -> None:
    """Make sure of what would else be missed behind the first runs.

    Raises:
        UserError: a model was not trained yet, or what measures IF-Eval is not installed.
    """
    for model in [recipe.config.model for arm in arms for recipe in arm.recipe.with_sources()]:
        if model.startswith("./") and not Path(model).is_dir():
            raise UserError(f"there is no model {model}: experiments/README.md says how it is trained")
    if experiment.out_of_distribution and any(arm.recipe.config.model != MICRO for arm in arms):
        ifeval.check_installed()


def described(recipe: Recipe) -> str:
    """How a run is made, in a line."""
    command = shlex.join(["oel", "run", recipe.preset, *recipe.overrides])
    taken = [f"{item.what} of round {item.round} of {item.source.name}" for item in recipe.imports]
    return f"{command} ({', '.join(taken)})" if taken else command


def plan(experiment: Experiment, arms: Sequence[Arm], seeds: Sequence[int], start: Start, runs: Runs) -> Iterator[str]:
    """What would be run, in order, a line each, and how much that is.

    Raises:
        UserError: a folder holds a run of other settings.
    """
    recipes = list(dict.fromkeys(recipe for arm in arms for recipe in arm.recipe.with_sources()))
    total = Work()
    for recipe in recipes:
        work = work_of_run(recipe)
        left = [seed for seed in seeds if not runs.is_made(recipe, seed)]
        yield f"{recipe.name}, {f'seeds {_listed(left)}' if left else 'done'}: {described(recipe)}"
        yield f"    each {work}"
        total = total.plus(work, len(left))
    for arm in arms:
        work = work_of_measures(experiment, arm)
        if any(work):
            yield f"{arm.label}, seeds {_listed(seeds)}, behind its run: each {work}"
        total = total.plus(work, len(seeds))
    yield f"in all: {total}"
    if start.config.model == MICRO:
        yield f"about {total.minutes:.0f} minutes on two quiet cores, less what stopped runs have done already"


def _listed(seeds: Sequence[int]) -> str:
    return " ".join(map(str, seeds))


def run_child(command: Sequence[str]) -> None:
    """Run a command to its end; ends this process with its exit code where it fails, or with 130 where asked to.

    It is waited for, also when this process is asked to end: a terminal's Ctrl-C it hears itself, SIGTERM is passed on.
    """
    print(f"experiments: {shlex.join(command)}", file=sys.stderr, flush=True)
    asked: list[int] = []
    with subprocess.Popen(command) as child:

        def stop(number: int, frame: FrameType | None) -> None:
            asked.append(number)
            if number == signal.SIGTERM:
                child.terminate()

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if child.returncode or asked:
        sys.exit(child.returncode if child.returncode > 0 else 130 if asked else 1)


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> int:
    """The command line of an experiment; returns the exit code. What ends a run's command ends this one, too."""
    try:
        _main(experiment, _arguments(experiment).parse_args(arguments))
    except UserError as error:
        print(f"experiments: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _main(experiment: Experiment, options: argparse.Namespace) -> None:
    start = Start(options.preset, tuple(options.set))
    arms = experiment.arms(start)
    if unknown := set(options.arms) - {arm.label for arm in arms}:
        raise UserError(f"no arm {min(unknown)}: {experiment.name} has {', '.join(arm.label for arm in arms)}")
    chosen = [arm for arm in arms if not options.arms or arm.label in options.arms]
    runs = Runs(options.out / start.name)
    if options.plan:
        print(*plan(experiment, chosen, options.seeds, start, runs), sep="\n")
        return
    check_there(experiment, chosen)
    options.results.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for arm in chosen:
            it = result(experiment, arm, start, runs, seed, options.seeds)
            path = options.results / it.file_name
            write_atomically(path, it.model_dump_json(indent=1).encode() + b"\n")
            print(path, flush=True)


def _arguments(experiment: Experiment) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{experiment.name}",
        description=f"{experiment.title}. {experiment.question}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--preset", default="experiments/micro.yaml", help="a preset or a YAML file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a repetition each")
    parser.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="only these; else all")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all arms")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="the folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the results")
    parser.add_argument("--plan", action="store_true", help="say what would be run, and run nothing")
    return parser


def _machine(config: RunConfig) -> str:
    import torch

    from benchmarks.harness import machine

    return machine("cuda" if config.engines.device != "cpu" and torch.cuda.is_available() else "cpu")
