"""What the runner would do, and what it reads from a run. Nothing is run here."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments import beyond, measure, on_vs_off_policy, own_vs_other, recipes, rounds, runner
from experiments.records import Arm, Import, Recipe, Start
from experiments.report import EXPERIMENTS
from oel_ray.envs import make
from oel_ray.errors import UserError
from oel_ray.imports.games import Imported, put_trajectories
from oel_ray.models.policy import check_model
from oel_ray.preflight import check_context
from oel_ray.records import Trajectory, read_jsonl
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.layout import POLICY_REFERENCE
from oel_ray.runs.schedule import planned_stages
from tests.support import example_run

MICRO = "experiments/micro.yaml"
START = Start(MICRO)
QWEN = [f"frozenlake-qwen3-{size}" for size in ("1.7b", "4b")]
RUN = Path("runs/x")


def named(name: str, start: Start = START) -> list[Arm]:
    (experiment,) = (it for it in EXPERIMENTS if it.name == name)
    return experiment.arms(start)


def recipe(label: str, name: str) -> Recipe:
    (found,) = (arm.recipe for arm in named(name) if arm.label == label)
    return found


def files(item: Import) -> Sequence[Path]:
    names = ["k0.json", "k1.json"] if item.what == "knowledge" else [f"{item.what}.jsonl"]
    return [Path(item.source.name) / str(item.round) / name for name in names]


def following(it: Recipe, *stages: str) -> list[str]:
    """The next command of a run with these stages of round 1, the untouched model being evaluated."""
    committed = {0: {"prepare", "evaluate"}, 1: set(stages)}
    return runner.next_command(it, 7, RUN, committed, files) or []


@pytest.mark.parametrize("preset", [MICRO, "quickstart", *QWEN])
def test_every_arm_is_a_configuration_and_each_name_stands_for_one_recipe(preset: str) -> None:
    known: dict[str, Recipe] = {}
    for experiment in EXPERIMENTS:
        arms = experiment.arms(Start(preset))
        labels = [arm.label for arm in arms]
        assert len(labels) == len(set(labels))
        assert experiment.reference in labels
        for arm in arms:
            assert arm.rounds <= arm.recipe.config.rounds
            for one in arm.recipe.with_sources():
                assert known.setdefault(one.name, one) == one
                assert all(item.round <= item.source.config.rounds for item in one.imports)


def test_an_arm_differs_from_the_reference_in_what_it_is_about() -> None:
    off, on = recipe("off_policy", "on_vs_off_policy").config, recipe("on_policy", "on_vs_off_policy").config
    assert (off.consolidate.responses, off.consolidate.divergence) == ("teacher", "forward")
    same = {"responses": "student", "divergence": "full"}
    assert off.consolidate.model_copy(update=same) == on.consolidate
    raw, extracted = recipe("raw", "knowledge_vs_raw").config, recipe("extracted", "knowledge_vs_raw").config
    assert (raw.extract.format, extracted.extract.format) == ("raw", "structured")
    assert raw.consolidate.model_copy(update={"keep_steps": (6, 13)}) == extracted.consolidate


def test_an_arm_shares_the_first_round_with_the_reference_as_far_as_they_are_alike() -> None:
    shared = {arm.label: {item.what for item in arm.recipe.imports} for arm in named("beyond")}
    nothing: set[str] = set()
    games, texts = {"extraction", "consolidation"}, {"consolidation", "knowledge"}
    assert shared == {
        **dict.fromkeys(["base", "n-quarter", "n-double"], nothing),
        **dict.fromkeys(["K-1", "K-10", "L_max-quarter", "L_max-double"], games),
        **dict.fromkeys(["top-256", "stale-1", "live-teacher"], texts),
    }
    assert {item.source for arm in named("beyond") for item in arm.recipe.imports} == {recipes.base(START)}


def test_the_micro_model_has_room_for_raw_games() -> None:
    config = recipe("raw", "knowledge_vs_raw").config
    model = check_model(config, print)
    check_context(config, model, model, make(config.env.id, 0, config.env.params))


def test_a_run_is_started_if_absent_resumed_if_unfinished_and_left_alone_if_finished() -> None:
    base = recipes.base(START)
    started = runner.next_command(base, 7, RUN, None, files)
    assert started == ["run", MICRO, *base.overrides, "seed=7", "--run-dir", str(RUN)]
    assert following(base, "collect") == ["run", "--resume", "--run-dir", str(RUN)]
    committed = {number: planned_stages(base.config, number) for number in range(4)}
    assert runner.next_command(base, 7, RUN, committed, files) is None


def test_imports_come_before_the_other_stages_and_after_a_kill_only_missing_imports_are_given() -> None:
    raw = recipe("raw", "knowledge_vs_raw")
    new = [*raw.overrides, "seed=7", "--config", MICRO]
    read, practised = ("--trajectories", "base/1/extraction.jsonl"), ("--trajectories", "base/1/consolidation.jsonl")
    where = [str(RUN), "--round", "1"]
    assert runner.next_command(raw, 7, RUN, None, files) == ["extract", str(RUN), *new, "--round", "1", *read]
    assert following(raw) == ["extract", *where, *read]
    assert following(raw, "import_extraction") == ["extract", *where]
    assert following(raw, "import_extraction", "extract") == ["consolidate", *where, *practised]
    there = ("import_extraction", "extract", "import_consolidation")
    assert following(raw, *there) == ["run", "--resume", "--run-dir", str(RUN)]
    assert following(raw, *there, "consolidate", "evaluate_in_context", "evaluate") == []

    later, texts = recipe("later", "own_vs_other"), ["--knowledge", "base/3/k0.json", "--knowledge", "base/3/k1.json"]
    assert following(later) == ["consolidate", *where, *practised, *texts]
    assert following(later, "import_consolidation") == ["consolidate", *where, *texts]


def test_the_work_of_a_run_is_what_its_configuration_says() -> None:
    work = runner.work_of_run(recipes.base(START))
    learned_on, evaluated = 3 * (24 + 20 * 8), 128 * 3 * (4 + 3 * 4)
    assert (work.games, work.extractions, work.steps) == (learned_on + evaluated, 3 * 3 * 24, 60)
    imported = runner.work_of_run(recipe("later", "own_vs_other"))
    assert (imported.games, imported.extractions, imported.commands) == (128 * 3 * 3, 0, 2)


def test_measured_points_name_their_round_step_and_source_file(tmp_path: Path) -> None:
    run = RunFolder.open(example_run.build(tmp_path / "base/seed-0"))
    points = {point.key: point for point in measure.run_points(run, 2, tmp_path)}
    assert sorted(key[:2] for key in points if key.step is None) == [
        ("in_context", 1), ("in_context", 2), ("policy", 0), ("policy", 1), ("policy", 2)
    ]  # fmt: skip
    early = points["in_context", 2, example_run.EARLY_STEP]
    assert (early.rate, early.error, early.count, early.tokens_per_turn) == (0.375, 0.125, 8, 2.0)
    assert early.source == "base/seed-0/rounds/002/evaluation.json"
    entry = run.manifest(2).stages["evaluate"].files["evaluation.json"]
    assert entry.sha256.startswith(early.sha256)
    places = [point.place for point in sorted(points.values(), key=lambda it: it.place)]
    assert places == pytest.approx([0, 0.45, 0.9, 1, 1.45, 1.9, 2])
    assert max(point.round for point in measure.run_points(run, 1, tmp_path)) == 1
    assert measure.knowledge_tokens(run, 2) == {1: 7, 2: 7}
    hashes = measure.knowledge_hash(run, 2)
    assert list(hashes) == [1, 2]
    first = run.files(1).knowledge_files()[0]
    example_run.edit_json(first, lambda it: it.update(id="another", tokens=1))
    assert measure.knowledge_hash(run, 2) == hashes
    example_run.edit_json(first, lambda it: it.update(text=it["text"] + "!"))
    assert (changed := measure.knowledge_hash(run, 2))[1] != hashes[1]
    assert changed[2] == hashes[2]
    before = measure.model_hash(run)
    example_run.edit_json(run.files(0).policy / POLICY_REFERENCE, lambda it: it.update(model="elsewhere"))
    assert measure.model_hash(run) == before
    example_run.edit_json(run.files(0).policy / POLICY_REFERENCE, lambda it: it["files"].update({"config.json": "0"}))
    assert measure.model_hash(run) != before


@pytest.mark.parametrize(
    ("preset", "name"),
    [("quickstart", "quickstart"), (MICRO, "micro"), (QWEN[0], QWEN[0]), ("my/own-1.7b.yaml", "own-1.7b")],
)
def test_folders_and_files_are_called_after_the_whole_preset(preset: str, name: str) -> None:
    assert Start(preset).name == name


class Made(runner.Runs):
    """Every run is there, and is the example."""

    def made(self, recipe: Recipe, seed: int) -> RunFolder:
        path = self.folder(recipe, seed)
        return RunFolder.open(path if path.exists() else example_run.build(path))


def test_a_result_names_its_run_and_every_arm_and_seed_that_was_asked_for(tmp_path: Path) -> None:
    start, runs = Start("quickstart", ("rounds=2",)), Made(tmp_path)
    arms = named("beyond", start)
    it = runner.result(beyond.EXPERIMENT, arms[0], start, runs, 1, [0, 1])
    assert (it.experiment, it.arm, it.seed, it.seeds, it.preset) == ("beyond", "base", 1, (0, 1), "quickstart")
    assert it.arms == tuple(it.label for it in arms)
    assert it.settings == ("rounds=2",)
    assert (it.random, it.oracle) == (0.11, 1.0)
    assert it.run_id == runs.made(arms[0].recipe, 1).info["run_id"]


def test_a_run_of_other_settings_is_not_resumed(tmp_path: Path) -> None:
    base = recipes.base(START)
    example_run.build(tmp_path / "base/seed-7")
    with pytest.raises(UserError, match="holds a run of other settings: choose another --out"):
        runner.Runs(tmp_path).made(base, 7)


def test_a_run_whose_settings_changed_on_the_way_is_not_resumed(tmp_path: Path) -> None:
    base, runs = recipes.base(START), runner.Runs(tmp_path)
    config, path = base.config.model_copy(update={"seed": 7}), runs.folder(base, 7)
    with RunFolder.create(path, config.model_copy(update={"rounds": 4})):
        pass
    with RunFolder.resume(path, config, allow_change=True):
        assert RunFolder.open(path).config == config
    with pytest.raises(UserError, match="holds a run of other settings"):
        runs.made(base, 7)


def test_a_policy_is_measured_once_and_again_only_if_its_weights_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[Sequence[str]] = []
    monkeypatch.setattr(runner, "run_child", commands.append)
    base, runs, policy = recipes.base(START), Made(tmp_path), runner.Policy(1, None)
    run = runs.made(base, 0)
    first = runs.measured(base, run, policy, 0)
    assert commands == [
        [sys.executable, "-m", "experiments.worlds", str(run.policy(1)), "--out", str(first), "--seed", "0"]
    ]
    first.write_text("{}")
    assert runs.measured(base, run, policy, 0) == first
    assert len(commands) == 1, "something was done twice"

    def another(manifest: Any) -> None:
        manifest["stages"]["consolidate"]["files"]["policy/model.safetensors"]["sha256"] = "0" * 64

    example_run.edit_json(run.files(1).manifest, another)
    assert runs.measured(base, run, policy, 0) != first
    assert len(commands) == 2


def test_arms_that_do_not_share_what_they_should_are_not_compared(tmp_path: Path) -> None:
    source, seed = recipes.base(START), 7
    taker = START.recipe("taker", "rounds=1", imports=recipes.taken(source, 1, *recipes.GAMES))
    runs = runner.Runs(tmp_path)
    for one in (source, taker):
        with RunFolder.create(runs.folder(one, seed), one.config.model_copy(update={"seed": seed})) as run:
            example_run.run_stages(run)
            for split in recipes.GAMES if one is taker else ():
                games = run.files(1).trajectories(split)
                put_trajectories(run, 1, split, Imported(read_jsonl(games, Trajectory), []))
    assert runs.made(taker, seed).path == runs.folder(taker, seed)
    example_run.edit_json(games, lambda game: game["turns"][0].update(response="another"), line=1)
    with pytest.raises(UserError, match=r"taker/seed-7 took consolidation that is not what .*base/seed-7 has now"):
        runs.made(taker, seed)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "label"), [("on_vs_off_policy", "off_policy"), ("knowledge_vs_raw", "raw")])
def test_an_arm_runs_its_oel_commands_once_and_shares_the_games_of_the_reference(
    name: str, label: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    experiment = next(it for it in EXPERIMENTS if it.name == name)._replace(out_of_distribution=False)
    (arm,) = (arm for arm in experiment.arms(START) if arm.label == label)
    runs = runner.Runs(tmp_path, [sys.executable, "-m", "tests.experiments.oel_without_ray"])
    it = runner.result(experiment, arm, START, runs, seed=0, seeds=[0, 1])
    capfd.readouterr()
    assert runner.result(experiment, arm, START, runs, seed=0, seeds=[0, 1]) == it
    assert "experiments:" not in capfd.readouterr().err, "something was done twice"

    made, base = (RunFolder.open(runs.folder(one, 0)) for one in (arm.recipe, recipes.base(START)))
    assert set(made.committed[1]) >= {"import_consolidation", "consolidate", "evaluate"}
    assert "collect" not in made.committed[1]
    ours, theirs = (read_jsonl(it.files(1).trajectories("consolidation"), Trajectory) for it in (made, base))
    assert [game.id for game in ours] == [game.id for game in theirs]
    kept = [key for key in (point.key for point in it.points) if key.condition == "policy" and key.step]
    assert kept == ([("policy", number, step) for number in (1, 2) for step in (2, 4)] if experiment.by_step else [])
    assert it.run_id == made.info["run_id"]


@pytest.mark.process
def test_a_command_that_fails_ends_the_experiment_with_its_exit_code() -> None:
    with pytest.raises(SystemExit) as ended:
        runner.run_child([sys.executable, "-c", "raise SystemExit(130)"])
    assert ended.value.code == 130


@pytest.mark.process
def test_a_command_is_asked_to_end_when_its_experiment_is() -> None:
    child = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print(0, flush=True)"
    command = [sys.executable, "-c", f"{child}; time.sleep(30)"]
    program = f"from experiments.runner import run_child; run_child({command})"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        process.terminate()
        assert process.wait(20) == 7


def test_a_model_or_package_that_later_runs_need_is_missed_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "run_child", lambda command: pytest.fail(f"started {command}"))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert runner.main(own_vs_other.EXPERIMENT, ["--preset", "quickstart"]) == 2
    assert "no model ./build/micro-large: experiments/README.md says how" in capsys.readouterr().err
    assert runner.main(on_vs_off_policy.EXPERIMENT, ["--preset", QWEN[0]]) == 2
    assert "IF-Eval needs lm-evaluation-harness" in capsys.readouterr().err


def test_a_plan_counts_only_work_that_is_left(tmp_path: Path) -> None:
    (arm,) = named("rounds")
    runs, seeds = runner.Runs(tmp_path), [0, 1]
    *_, whole, _ = runner.plan(rounds.EXPERIMENT, [arm], seeds, START, runs)
    with RunFolder.create(runs.folder(arm.recipe, 0), arm.recipe.config) as run:
        example_run.run_stages(run)
    first, *_, half, _ = runner.plan(rounds.EXPERIMENT, [arm], seeds, START, runs)
    assert first.startswith("base, seeds 1: oel run experiments/micro.yaml")
    assert (whole.split()[2], half.split()[2]) == ("13392", "6696")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--plan", "--seeds", "5"], 0, "oel run experiments/micro.yaml rounds=3"),
        (["--arms", "nobody"], 2, "no arm nobody: rounds has oel"),
        (["--plan", "--set", "extract.sedes=1"], 2, "did you mean 'extract.seeds'?"),
    ],
)
def test_the_command_line_plans_or_refuses_with_the_right_exit_code(
    options: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.main(rounds.EXPERIMENT, options) == code
    printed = capsys.readouterr()
    assert said in printed.out + printed.err
