"""Online Experiential Learning (arXiv 2603.16856, algorithm 1) as the driver runs it.

    for every round:
        collect      the policy plays: T for extraction, T' for prefixes
        extract      K accumulations turn T into K knowledge texts
        consolidate  the knowledge is distilled into the weights, on-policy
        evaluate     held-out maps; feeds nothing
        deploy       the new policy plays the next round

A stage writes into a folder of its own and is committed whole; a committed stage is never done again, and one that was
interrupted goes on with the games, steps or checkpoints that it has.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from oel_ray import layout
from oel_ray.chat import ChatFormat
from oel_ray.collect.stage import Game, Played, Players, play_missing, players
from oel_ray.config import RunConfig
from oel_ray.consolidate.prefixes import prefixes, step_batches
from oel_ray.durable import write_json
from oel_ray.engines.pool import Pool, engine_pool
from oel_ray.envs.baselines import oracle_rate, random_rate
from oel_ray.envs.splits import held_out_episodes, training_episodes
from oel_ray.errors import RunFailed
from oel_ray.evaluate.metrics import evaluation
from oel_ray.evaluate.stage import evaluated, evaluation_games
from oel_ray.extract.items import growth
from oel_ray.models import model_files, resolve_model
from oel_ray.preflight import tell_outlook
from oel_ray.progress import Progress, StageProgress
from oel_ray.records import Episode, EvaluationGame, KnowledgeText, Split, Trajectory, read_jsonl, write_jsonl
from oel_ray.resources import ray_cluster
from oel_ray.runs import RunFolder, Stage
from oel_ray.schedule import check_imports, unfinished


def run(config: RunConfig, folder: RunFolder, progress: Progress) -> None:
    """Do all stages of all rounds that are not done yet.

    Raises:
        UserError: something in the configuration cannot work here.
        RunFailed: a stage failed, or was left out; what was committed before stays.
    """
    prepare(config, folder, progress)
    check_imports(config, folder.committed)
    if todo := unfinished(config, folder.committed):
        work(config, folder, progress, todo)
    if left := unfinished(config, folder.committed):
        raise RunFailed(f"the run came to its end without {', '.join(f'{name} of round {at}' for at, name in left)}")


def work(config: RunConfig, folder: RunFolder, progress: Progress, todo: Sequence[tuple[int, str]]) -> None:
    """Do these stages, (round, name) in order, on a Ray of their own; raises what `run` raises."""
    policy = folder.policy(max(todo[0][0] - 1, 0))
    with ray_cluster(config, folder.run_id, progress.note) as on_gpu:
        tell_outlook(config, policy, progress.note, on_gpu=on_gpu)
        progress.note(f"starting {config.engines.count} engines on {policy}")
        with (
            engine_pool(config.engines, policy, on_gpu=on_gpu) as pool,
            players(config, policy, pool.client) as gamers,
        ):
            rounds = Rounds(config, folder, progress, pool, gamers, on_gpu=on_gpu)
            for number, name in todo:
                getattr(rounds, name)(number)


def prepare(config: RunConfig, folder: RunFolder, progress: Progress) -> None:
    """Record what round 0's policy is: the untouched model. That it can be used was `oel_ray.preflight`'s to check."""
    stage = folder.stage(0, layout.PREPARE)
    if stage.is_done:
        return
    model = resolve_model(config.model, progress.note)
    out = stage.begin()
    reference = out.policy / layout.POLICY_REFERENCE
    write_json(reference, {"model": str(model), "files": model_files(model)})
    stage.commit([reference], {})


@dataclass
class Rounds:
    """The stages of a round, one method each. State: which policy the engines serve; everything else is on disk."""

    config: RunConfig
    folder: RunFolder
    progress: Progress
    pool: Pool
    players: Players
    on_gpu: bool
    _deployed: int | None = None

    def collect(self, number: int) -> None:
        """The policy of the round before plays T and T'."""
        wanted = self.config.training_games
        with self._stage(number, layout.COLLECT, sum(wanted.values()), "games") as (stage, progress):
            self._deploy(number - 1)
            excluded = {episode.map_hash for episode in self.held_out}
            games = [
                Game(episode, self.config.collect.sampling_for(split).sampling())
                for split, count in wanted.items()
                for episode in training_episodes(self.config.env, self.config.seed, number, split, count, excluded)
            ]
            stage.begin(*self._policy(number - 1), games)
            played = self._play(stage, games, Trajectory, lambda _, trajectory, __: trajectory, progress)
            counts: dict[str, int] = {
                split: write_jsonl(stage.out.trajectories(split), [game for game in played if game.split == split])
                for split in wanted
            }
            stage.commit(map(stage.out.trajectories, wanted), counts)

    def extract(self, number: int) -> None:
        """K accumulations read T."""
        from oel_ray.extract.stage import extract

        trajectories = self._trajectories(number, "extraction")
        config = self.config.extract
        with self._stage(number, layout.EXTRACT, config.seeds * len(trajectories), "steps") as (stage, progress):
            self._deploy(number - 1)
            stage.begin(*self._policy(number - 1), config.model_dump(exclude={"workers", "resources"}), trajectories)
            texts = extract(
                trajectories,
                number,
                self.config,
                self.folder.policy(number - 1),
                self.pool.client,
                lambda done, _: progress.update(done),
                partial(stage.journal, note=self.progress.note),
            )
            stage.commit_knowledge(texts)

    def evaluate_in_context(self, number: int) -> None:
        """The teacher's view: the policy that played, with the knowledge in its prompt."""
        knowledge = growth(self._knowledge(number), self.config.evaluate.accumulation_steps)
        self._evaluate(number, layout.EVALUATE_IN_CONTEXT, number - 1, knowledge)

    def consolidate(self, number: int) -> None:
        """Distil the knowledge into the weights; writes the new policy."""
        from oel_ray.consolidate.job import Job
        from oel_ray.consolidate.stage import consolidate

        config = self.config.consolidate
        with self._stage(number, layout.CONSOLIDATE, config.steps, "steps") as (stage, progress):
            stage.begin("checkpoints")
            version = self._deploy(number - 1)
            policy = self.folder.policy(number - 1)
            chat = ChatFormat.from_pretrained(policy, thinking=self.config.thinking)
            starts = prefixes(self._trajectories(number, "consolidation"), chat)
            knowledge = self._knowledge(number)
            plan = step_batches(starts, len(knowledge), config, run_seed=self.config.seed, round_number=number)
            out = stage.out
            job = Job(
                config=self.config,
                round=number,
                policy=policy,
                teacher=resolve_model(config.teacher, self.progress.note) if config.teacher else policy,
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
                scratch=(out.root / "ray_train").resolve(),
            )
            self._deployed = None  # from the first step on the engines serve what the trainer sends
            name = f"{self.folder.run_id}-round-{number:03d}"
            samples = consolidate(job, name, progress.update, self.progress.note)
            counts = {"metrics": config.steps, "samples": samples}
            stage.commit([out.consolidation_metrics, out.samples, out.policy], counts)

    def evaluate(self, number: int) -> None:
        """The policy that the round ended with, on the held-out maps."""
        self._evaluate(number, layout.EVALUATE, number, [])

    @cached_property
    def held_out(self) -> list[Episode]:
        """The maps of every evaluation of this run; none are set aside if there is none."""
        config = self.config
        if not config.evaluate.enabled:
            return []
        return held_out_episodes(config.env, config.seed, config.evaluate.maps)

    @cached_property
    def baselines(self) -> dict[str, float | None]:
        """Pass rates of the random and the oracle player on the held-out maps."""
        turns, games = self.config.env.max_turns, self.config.evaluate.random_games
        random = random_rate(self.held_out, turns, games, self.config.seed)
        return {"random": random, "oracle": oracle_rate(self.held_out, turns)}

    def _evaluate(self, number: int, name: str, policy_of: int, knowledge: list[list[KnowledgeText]]) -> None:
        planned = evaluation_games(self.held_out, self.config.evaluate, number, knowledge)
        with self._stage(number, name, len(planned), "games") as (stage, progress):
            self._deploy(policy_of)
            stage.begin(*self._policy(policy_of), planned)
            games = self._play(stage, planned, EvaluationGame, evaluated, progress)
            if name == layout.EVALUATE_IN_CONTEXT:
                stage.commit([stage.out.in_context], {"in_context": write_jsonl(stage.out.in_context, games)})
                return
            seen = self.folder.files(number).in_context
            in_context = read_jsonl(seen, EvaluationGame) if seen.exists() else []
            result = evaluation(games, in_context, **self.baselines)
            stage.out.evaluation.write_bytes(result.to_json() + b"\n")
            count = write_jsonl(stage.out.evaluation_games, games)
            stage.commit([stage.out.evaluation, stage.out.evaluation_games], {"evaluation": count})

    def _play(
        self,
        stage: Stage,
        games: Sequence[Game],
        kind: type[Played],
        record: Callable[[Game, Trajectory, bool], Played],
        progress: StageProgress,
    ) -> list[Played]:
        """The records of all games, whatever goes wrong meanwhile and is made good."""
        journal = stage.journal("games.jsonl", kind, self.progress.note)
        return play_missing(self.players, games, journal, record, progress.update)

    @contextmanager
    def _stage(self, number: int, name: str, total: int, unit: str) -> Iterator[tuple[Stage, StageProgress]]:
        stage = self.folder.stage(number, name)
        before = self.pool.counts()
        with self.progress.stage(number, self.config.rounds, name, total, unit) as progress:
            yield stage, progress
        if entry := stage.entry:
            happened = self._happened(before)
            self.folder.log_metrics({"round": number, "stage": name, "wall_s": entry.wall_s, **entry.counts} | happened)

    def _happened(self, before: Counter[str]) -> dict[str, Any]:
        """What engines and players did since `before`, for the metrics; the user is told what went wrong meanwhile."""
        counts, failures = self.pool.counts(), self.players.take_failures()
        counts.subtract(before)
        engines = {"engines replaced": counts["engine_restarts"], "requests moved": counts["requests_moved"]}
        if told := [f"{times} x {what}" for what, times in (engines | failures).items() if times]:
            self.progress.note(f"went wrong and was made good: {', '.join(told)}")
        hit_rate = counts["cached_tokens"] / max(counts["prompt_tokens"], 1)
        return {**counts, "prefix_cache_hit_rate": round(hit_rate, 4), "failures": failures}

    def _policy(self, policy_of: int) -> tuple[Any, ...]:
        """All that decides what a policy answers, beside what it is asked."""
        config = self.config
        settings = (config.thinking, config.seed, config.env, config.engines.max_model_len)
        return *settings, self.folder.policy_files(policy_of)

    def _deploy(self, policy_of: int) -> str:
        """Have the engines serve the policy that a round ended with; returns its weight version."""
        version = f"r{policy_of:03d}"
        if self._deployed != policy_of:
            self.pool.deploy(self.folder.policy(policy_of), version)
            self._deployed = policy_of
        return version

    def _trajectories(self, number: int, split: Split) -> list[Trajectory]:
        return read_jsonl(self.folder.files(number).trajectories(split), Trajectory)

    def _knowledge(self, number: int) -> list[KnowledgeText]:
        return [KnowledgeText.from_json(path.read_bytes()) for path in self.folder.files(number).knowledge_files()]
