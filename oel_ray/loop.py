"""Online Experiential Learning (arXiv 2603.16856, algorithm 1) as the driver runs it.

    for every round:
        collect      the policy plays: T for extraction, T' for prefixes
        extract      K accumulations turn T into K knowledge texts
        consolidate  the knowledge is distilled into the weights, on-policy
        evaluate     held-out maps; feeds nothing
        deploy       the new policy plays the next round

A stage writes into a folder of its own and is committed whole. A committed stage is never done again. An interrupted
stage resumes with the games, steps or checkpoints that it has.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from oel_ray.cluster.session import ray_cluster
from oel_ray.cluster.stacks import HANG_FOLDER
from oel_ray.config.precision import precisions
from oel_ray.config.schema import RunConfig
from oel_ray.consolidate.prefixes import prefixes, step_batches
from oel_ray.engines.client import Pool
from oel_ray.engines.pool import engine_pool
from oel_ray.envs.baselines import oracle_rate, random_rate
from oel_ray.envs.splits import held_out_episodes, training_episodes
from oel_ray.errors import RunFailed
from oel_ray.extract.items import growth
from oel_ray.ids import policy_version
from oel_ray.models.resolve import resolve_model
from oel_ray.play.evaluation import as_evaluation_game, plan_games, score_round
from oel_ray.play.players import Game, Players, play_missing, player_pool
from oel_ray.preflight import report_outlook
from oel_ray.records import Episode, EvaluationGame, KnowledgeText, Split, Trajectory, read_jsonl, write_jsonl
from oel_ray.runs import layout
from oel_ray.runs.files import model_files, write_json
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.schedule import check_imports, unfinished
from oel_ray.runs.stage import Stage
from oel_ray.telemetry.progress import Progress, StageProgress
from oel_ray.telemetry.run import Telemetry
from oel_ray.telemetry.trackers import tracking
from oel_ray.text.chat import ChatFormat


def run(config: RunConfig, folder: RunFolder, progress: Progress) -> None:
    """Do all stages of all rounds that are not done yet.

    Raises:
        UserError: something in the configuration cannot work here.
        RunFailed: a stage failed, or was left out; stages committed before stay.
    """
    prepare(config, folder, progress)
    check_imports(config, folder.committed)
    if todo := unfinished(config, folder.committed):
        work(config, folder, progress, todo)
    if left := unfinished(config, folder.committed):
        raise RunFailed(f"the run came to its end without {', '.join(f'{name} of round {at}' for at, name in left)}")


def work(config: RunConfig, folder: RunFolder, progress: Progress, todo: Sequence[tuple[int, str]]) -> None:
    """Do these stages, (round, name) in order, in a Ray session of their own. Raises the same errors as `run`."""
    os.environ[HANG_FOLDER] = str(folder.path / "hang")
    policy = folder.policy(folder.deployed(todo[0][0]))
    chosen = ", ".join(f"{key}={value}" for key, value in precisions(config).items())
    progress.note(f"precision: {chosen}; auto stands for {folder.auto}")
    with ray_cluster(config, folder.run_id, progress.note) as on_gpu:
        report_outlook(config, policy, progress.note, on_gpu=on_gpu)
        progress.note(f"starting {config.engines.count} engines on {policy}")
        with (
            engine_pool(config.engines, policy, on_gpu=on_gpu) as pool,
            player_pool(config, policy, pool.client, folder.frame) as players,
            tracking(config, folder.run_id, folder.path, progress.note) as track,
        ):
            telemetry = Telemetry(folder, progress, pool, players, track)
            rounds = Rounds(config, folder, progress, pool, players, telemetry, on_gpu=on_gpu)
            for number, name in todo:
                getattr(rounds, name)(number)


def prepare(config: RunConfig, folder: RunFolder, progress: Progress) -> None:
    """Record round 0's policy, which is the untouched model, and the frame that its chat template puts around prompts.

    `oel_ray.preflight` has checked before that the model can be used.
    """
    stage = Stage(folder, 0, layout.PREPARE)
    if stage.is_done:
        return
    model = resolve_model(config.model, progress.note)
    out = stage.begin()
    reference = out.policy / layout.POLICY_REFERENCE
    frame = ChatFormat.from_pretrained(model, thinking=config.thinking).frame
    write_json(reference, {"model": str(model), "files": model_files(model), "frame": frame.model_dump()})
    stage.commit([reference], {})


@dataclass
class Rounds:
    """The stages of a round, one method each. State: the policy that the engines serve; all else is on disk."""

    config: RunConfig
    folder: RunFolder
    progress: Progress
    pool: Pool
    players: Players
    telemetry: Telemetry
    on_gpu: bool
    _deployed: int | None = None

    def collect(self, number: int) -> None:
        """Play T and T' with the policy of the round before."""
        wanted = self.config.training_games
        with self._stage(number, layout.COLLECT, sum(wanted.values()), "games") as (stage, progress):
            excluded = {episode.map_hash for episode in self.held_out}
            games = [
                Game(episode, self.config.collect.sampling_for(split).sampling())
                for split, count in wanted.items()
                for episode in training_episodes(self.config.env, self.config.seed, number, split, count, excluded)
            ]
            self._begin(stage, self.folder.deployed(number), games)
            journal = stage.journal("games.jsonl", Trajectory, self.progress.note)
            played = play_missing(self.players, games, journal, lambda _, trajectory, __: trajectory, progress.update)
            counts: dict[str, int] = {
                split: write_jsonl(stage.out.trajectories(split), [game for game in played if game.split == split])
                for split in wanted
            }
            stage.commit(map(stage.out.trajectories, wanted), counts)

    def extract(self, number: int) -> None:
        """Extract knowledge from T with K accumulations."""
        from oel_ray.extract.stage import extract

        trajectories = self._trajectories(number, "extraction")
        config, source_round = self.config.extract, self.folder.deployed(number)
        with self._stage(number, layout.EXTRACT, config.seeds * len(trajectories), "steps") as (stage, progress):
            asked = config.model_dump(exclude={"workers", "resources"}), trajectories
            self._begin(stage, source_round, *asked)
            texts = extract(
                trajectories,
                number,
                self.config,
                self.folder.policy(source_round),
                self.pool.client,
                lambda done, _: progress.update(done),
                partial(stage.journal, note=self.progress.note),
                self.folder.frame,
            )
            stage.commit_knowledge(texts)

    def evaluate_in_context(self, number: int) -> None:
        """Evaluate the teacher's view: the policy that played, with the knowledge in its prompt."""
        knowledge = growth(self.folder.files(number).knowledge_texts(), self.config.evaluate.accumulation_steps)
        self._evaluate(number, layout.EVALUATE_IN_CONTEXT, self.folder.deployed(number), knowledge)

    def consolidate(self, number: int) -> None:
        """Distil the knowledge into the weights, and write the new policy."""
        from oel_ray.consolidate.job import Job
        from oel_ray.consolidate.stage import consolidate

        config = self.config.consolidate
        with self._stage(number, layout.CONSOLIDATE, config.steps, "steps") as (stage, progress):
            stage.begin("checkpoints")
            version = self._deploy(source_round := self.folder.deployed(number))
            policy = self.folder.policy(source_round)
            frame = self.folder.frame
            chat = ChatFormat.from_pretrained(policy, thinking=self.config.thinking, frame=frame)
            starts = prefixes(self._trajectories(number, "consolidation"), chat)
            knowledge = self.folder.files(number).knowledge_texts()
            plan = step_batches(starts, len(knowledge), config, run_seed=self.config.seed, round_number=number)
            out = stage.out
            job = Job(
                config=self.config,
                round=number,
                policy=policy,
                teacher=resolve_model(config.teacher, self.progress.note) if config.teacher else policy,
                frame=frame,
                deployed=version,
                prefixes=starts,
                knowledge=knowledge,
                plan=plan,
                generate=self.pool.client,
                engines=self.pool.engines,
                on_gpu=self.on_gpu,
                metrics=out.consolidation_metrics.resolve(),
                samples=out.samples.resolve(),
                target=out.policy.resolve(),
                profile=self.folder.path / "profile",
                scratch=(out.root / "ray_train").resolve(),
            )
            self._deployed = None  # from the first step on the engines serve the trainer's weights
            name = f"{self.folder.run_id}-round-{number:03d}"
            trained = partial(self.telemetry.trained, progress, number, config.steps)
            samples = consolidate(job, name, trained, self.progress.note)
            written = [out.consolidation_metrics, out.samples, out.policy, *map(out.policy_after, config.keep_steps)]
            stage.commit(written, {"metrics": config.steps, "samples": samples})

    def evaluate(self, number: int) -> None:
        """Evaluate the policy that the round ended with on the held-out maps."""
        self._evaluate(number, layout.EVALUATE, number, [])

    @cached_property
    def held_out(self) -> list[Episode]:
        """Choose the maps of every evaluation of this run; none if nothing is evaluated."""
        return held_out_episodes(self.config.env, self.config.seed, self.config.evaluate.held_out)

    @cached_property
    def baselines(self) -> dict[str, float | None]:
        """Compute the pass rates of the random and the oracle player on the held-out maps."""
        turns, games = self.config.env.max_turns, self.config.evaluate.random_games
        random = random_rate(self.held_out, turns, games, self.config.seed)
        return {"random": random, "oracle": oracle_rate(self.held_out, turns)}

    def _evaluate(self, number: int, name: str, source_round: int, knowledge: list[list[KnowledgeText]]) -> None:
        planned = plan_games(self.held_out, self.config.evaluate, number, knowledge)
        with self._stage(number, name, len(planned), "games") as (stage, progress):
            self._begin(stage, source_round, planned)
            journal = stage.journal("games.jsonl", EvaluationGame, self.progress.note)
            games = play_missing(self.players, planned, journal, as_evaluation_game, progress.update)
            if name == layout.EVALUATE_IN_CONTEXT:
                stage.commit([stage.out.in_context], {"in_context": write_jsonl(stage.out.in_context, games)})
                return
            result = score_round(self.folder, number, games, self.config.gate, self.baselines)
            if result.gate:
                self.progress.note(f"round {number}: {result.gate}")
            stage.out.evaluation.write_bytes(result.to_json() + b"\n")
            counts = {"evaluation": write_jsonl(stage.out.evaluation_games, games)}
            stage.commit([stage.out.evaluation, stage.out.evaluation_games], counts)

    @contextmanager
    def _stage(self, number: int, name: str, total: int, unit: str) -> Iterator[tuple[Stage, StageProgress]]:
        stage, rounds = Stage(self.folder, number, name), self.config.rounds
        with self.telemetry.stage(stage), self.progress.stage(number, rounds, name, total, unit) as progress:
            yield stage, progress

    def _begin(self, stage: Stage, source_round: int, *asked: Any) -> None:
        """Start a stage in which that policy responds.

        Its inputs are everything that determines prompts and responses.
        """
        self._deploy(source_round)
        config, files = self.config, self.folder.policy_files(source_round)
        stage.begin(config.thinking, config.seed, config.env, config.engines.max_model_len, files, *asked)

    def _deploy(self, source_round: int) -> str:
        """Have the engines serve the policy that a round ended with; returns its weight version."""
        version = policy_version(source_round)
        if self._deployed != source_round:
            self.pool.deploy(self.folder.policy(source_round), version)
            self._deployed = source_round
            self.telemetry.serves(source_round)
        return version

    def _trajectories(self, number: int, split: Split) -> list[Trajectory]:
        return read_jsonl(self.folder.files(number).trajectories(split), Trajectory)
