"""Play games with a policy. `Player` is made into a Ray actor with many seats.

All seats of an actor share one event loop and use no threads, because environments are not thread-safe. A step takes
microseconds, a response seconds. An environment that hangs stops all seats. A watchdog in a thread of its own then
names the game.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oel_ray.cluster.stacks import WATCH, Named
from oel_ray.config.budget import play_response
from oel_ray.config.schema import RunConfig
from oel_ray.envs import make
from oel_ray.errors import EnvironmentFailed, RunFailed, one_line
from oel_ray.records import EndedBy, Episode, Frame, Generate, Sampling, Trajectory, Turn
from oel_ray.seeds import derive_seed
from oel_ray.text import prompts
from oel_ray.text.chat import ChatFormat


class Player(Named):
    """Build games from episodes and play them: the user's side of a run. `player_actor` makes it a Ray actor.

    State: the games in play, and which of them is inside a call of its environment.
    """

    def __init__(self, policy: Path, generate: Generate, config: RunConfig, frame: Frame | None = None) -> None:
        """`policy`: the folder that holds the tokenizer. `frame`: the run's own, see `ChatFormat`."""
        self._chat = ChatFormat.from_pretrained(policy, thinking=config.thinking, frame=frame)
        self._generate = generate
        self._config = config
        self._inside: list[str] = []

    async def play(
        self,
        episode: Episode,
        sampling: Sampling,
        knowledge: str = "",
        key: str | None = None,
        sampling_seed: int = 0,
    ) -> tuple[Trajectory, bool]:
        """Play one episode to its end; returns the trajectory, and whether the game was won.

        `key` is the routing key (the episode's id by default). `sampling_seed` differs between repeated games of one
        episode.

        Raises:
            EnvironmentFailed: the environment raised an error, or wanted to exit.
            RunFailed: the seed draws another map here than where the episode was planned.
        """
        config, env, turns = self._config, self._config.env, list[Turn]()
        max_prompt_tokens = config.engines.max_model_len - play_response(config)[1]
        with self._inside_of(episode):
            environment = make(episode.env, episode.seed, episode.params)
            observation = environment.reset()
        if environment.map_hash != episode.map_hash:
            raise RunFailed(
                f"{episode.env} drew another map for episode {episode.id} (seed {episode.seed}) than was planned: "
                "the nodes have different versions of the environment, or it does not keep to its seed"
            )
        ended_by: EndedBy = "turn_limit"
        outcome = f"The game was stopped after {env.max_turns} turns."
        template = prompts.game_template(show_actions=env.show_actions)
        for number in range(env.max_turns):
            situation = prompts.game_situation(environment.instructions, turns, observation, template)
            prompt_ids = self._chat.game_ids(situation, knowledge)
            if len(prompt_ids) > max_prompt_tokens:
                ended_by = "context_limit"
                outcome = f"The game was stopped after {number} turns because its text had become too long."
                break
            seed = derive_seed(config.seed, "play", episode.id, sampling_seed, number)
            generation = await self._generate(prompt_ids, sampling, seed=seed, key=key or episode.id)
            with self._inside_of(episode):
                step = environment.step(generation.text)
            turns.append(
                Turn(
                    observation=observation,
                    response=generation.text,
                    prompt_ids=prompt_ids,
                    response_ids=generation.token_ids,
                    action=step.action,
                    feedback=step.feedback,
                    weight_version=generation.weight_version,
                    finish_reason=generation.finish_reason,
                )
            )
            observation = step.feedback
            if step.done:
                ended_by, outcome = "environment", step.outcome
                break
        with self._inside_of(episode):
            won = environment.success()
        if ended_by == "environment" and env.state_result:
            outcome = prompts.with_result(outcome, won=won)
        trajectory = Trajectory(
            **episode.model_dump(),
            instructions=environment.instructions,
            template=template,
            turns=turns,
            outcome=outcome,
            ended_by=ended_by,
        )
        return trajectory, won

    @contextmanager
    def _inside_of(self, episode: Episode) -> Iterator[None]:
        """Guard a call of an episode's environment: note that it runs, and turn any error into `EnvironmentFailed`."""
        self._inside = [episode.id]
        try:
            yield
        except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody else's code may raise anything
            raise EnvironmentFailed(one_line(error)) from None
        finally:
            self._inside = []

    async def stuck(self, deadline_s: float) -> str:
        """Return the id of the game that was inside one environment call for all of `deadline_s` seconds, or "".

        Runs in parallel with the games, in the thread of the concurrency group `watch`.
        """
        before = self._inside
        await asyncio.sleep(deadline_s)
        return before[0] if before and self._inside is before else ""


def player_actor(seats: int, **options: Any) -> Any:
    """Make `Player` a Ray actor class that plays up to `seats` games at a time; `options` are Ray's actor options.

    Ray restarts the actor whenever it dies.
    """
    import ray

    # Retries are on for the actor, because Ray otherwise refuses calls during a restart. Calls that must not be
    # repeated set `max_task_retries=0` themselves.
    actor = ray.remote(concurrency_groups={WATCH: 1000})(Player)
    return actor.options(max_concurrency=seats, max_restarts=-1, max_task_retries=-1, **options)
