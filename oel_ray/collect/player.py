"""Plays games with a policy. `play` is a plain coroutine; `Player` wraps it into a Ray actor with many seats.

All seats of an actor share one event loop and no threads: environments are not safe in threads, and a step takes
microseconds while a response takes seconds. An environment that does not come back stops them all, so a second loop, in
a thread of its own, tells which one it is.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from oel_ray import prompts
from oel_ray.chat import ChatFormat
from oel_ray.config import EnvironmentConfig
from oel_ray.envs import Environment, make
from oel_ray.errors import EnvironmentFailed, RunFailed, one_line
from oel_ray.hang import WATCH, Named
from oel_ray.records import EndedBy, Episode, Generate, Sampling, Trajectory, Turn
from oel_ray.seeds import derive_seed


async def play(
    episode: Episode,
    environment: Environment,
    chat: ChatFormat,
    generate: Generate,
    sampling: Sampling,
    *,
    config: EnvironmentConfig,
    max_prompt_tokens: int,
    run_seed: int,
    knowledge: str = "",
    key: str | None = None,
    sampling_seed: int | None = None,
    inside: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[Trajectory, bool]:
    """Play one fresh environment to its end; returns the trajectory, and whether the game was won.

    `key` is the routing key (the episode's id by default). `sampling_seed` tells repeated games of one episode apart.
    The environment is called in contexts that `inside` makes.
    """
    turns: list[Turn] = []
    with inside():
        observation = environment.reset()
    ended_by: EndedBy = "turn_limit"
    outcome = f"The game was stopped after {config.max_turns} turns."
    template = prompts.game_template(show_actions=config.show_actions)
    for number in range(config.max_turns):
        situation = prompts.game_situation(environment.instructions, turns, observation, template)
        prompt_ids = chat.game_ids(situation, knowledge)
        if len(prompt_ids) > max_prompt_tokens:
            ended_by = "context_limit"
            outcome = f"The game was stopped after {number} turns because its text had become too long."
            break
        seed = derive_seed(run_seed, "play", episode.id, sampling_seed or 0, number)
        generation = await generate(prompt_ids, sampling, seed=seed, key=key or episode.id)
        with inside():
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
    with inside():
        won = environment.success()
    if ended_by == "environment" and config.state_result:
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


class Player(Named):
    """The user's side of a run: builds games from episodes and plays them. Made into a Ray actor by `player_actor`.

    State: the games in play, and which of them is inside its environment.
    """

    def __init__(self, policy: Path, *, thinking: bool, **settings: Any) -> None:
        """`policy`: the folder that holds the tokenizer. `settings` go to `play`, for all games alike."""
        chat = ChatFormat.from_pretrained(policy, thinking=thinking)
        self._play: Callable[..., Awaitable[tuple[Trajectory, bool]]] = partial(play, chat=chat, **settings)
        self._inside: list[str] = []

    async def play(
        self,
        episode: Episode,
        sampling: Sampling,
        knowledge: str = "",
        key: str | None = None,
        sampling_seed: int | None = None,
    ) -> tuple[Trajectory, bool]:
        """Play one episode; see `play`.

        Raises:
            EnvironmentFailed: the environment raised an error, or wanted to exit.
            RunFailed: the seed draws another map here than where the episode was planned.
        """

        @contextmanager
        def inside() -> Iterator[None]:
            self._inside = [episode.id]
            try:
                yield
            except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody else's code may raise anything
                raise EnvironmentFailed(one_line(error)) from None
            finally:
                self._inside = []

        with inside():
            environment = make(episode.env, episode.seed, episode.params)
        if environment.map_hash != episode.map_hash:
            raise RunFailed(
                f"{episode.env} drew another map for episode {episode.id} (seed {episode.seed}) than was planned: "
                "the nodes have different versions of the environment, or it does not keep to its seed"
            )
        told: dict[str, Any] = {"knowledge": knowledge, "key": key, "sampling_seed": sampling_seed}
        return await self._play(episode, environment, sampling=sampling, **told, inside=inside)

    async def stuck(self, deadline_s: float) -> str:
        """After so many seconds: the game that has been in one call of its environment all the while, or "".

        Runs beside the games, in the thread of the concurrency group `watch`.
        """
        before = self._inside
        await asyncio.sleep(deadline_s)
        return before[0] if before and self._inside is before else ""


def player_actor(seats: int, **options: Any) -> Any:
    """`Player` as a Ray actor class that plays up to `seats` games at a time; `options` are Ray's actor options.

    Ray starts it again whenever it dies.
    """
    import ray

    # Without retries for the actor Ray refuses calls while it starts again; those that must not be repeated say so.
    actor = ray.remote(concurrency_groups={WATCH: 1000})(Player)
    return actor.options(max_concurrency=seats, max_restarts=-1, max_task_retries=-1, **options)
