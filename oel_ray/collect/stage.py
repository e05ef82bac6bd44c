"""Playing many games: player actors with many seats each. Runs in the driver.

Nothing waits for the slowest of a batch: whenever a game ends its seat takes the next one.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ray
from ray.exceptions import RayTaskError

from oel_ray.collect.player import player_actor
from oel_ray.config import RunConfig
from oel_ray.engines.pool import DIED
from oel_ray.errors import EngineUnavailable, RunFailed, one_line
from oel_ray.journal import Journal
from oel_ray.plan import play_response
from oel_ray.records import Episode, Generate, KnowledgeText, Sampling, Trajectory
from oel_ray.stopping import draining

PLAYER_CPUS = 1
_POLL_S = 0.5
_ATTEMPTS = 3

Played = TypeVar("Played", bound=Trajectory)


class Game(NamedTuple):
    """An episode as it is to be played: how responses are sampled, and with which knowledge text in the prompt."""

    episode: Episode
    sampling: Sampling
    knowledge: KnowledgeText | None = None
    sampling_seed: int = 0


class Players:
    """The player actors of a run. State: which seat plays what; a lost player's games are played again elsewhere."""

    def __init__(self, actors: Sequence[Any], seats: int) -> None:
        self._actors = actors
        self._seats = seats

    def play(
        self,
        games: Sequence[Game],
        on_progress: Callable[[int], None],
        on_played: Callable[[Game, Trajectory, bool], None] = lambda game, trajectory, success: None,
    ) -> list[tuple[Trajectory, bool]]:
        """Play all games; returns trajectory and success of each, in the order of `games`.

        `on_played` is told of each as soon as it has ended.

        Raises:
            RunFailed: a game failed three times; names the game and the error.
            KeyboardInterrupt: the run was asked to stop. Games in play may end first, see `draining`.
        """
        results: list[tuple[Trajectory, bool] | None] = [None] * len(games)
        waiting = deque((index, 1) for index in range(len(games)))
        # Seats in turn over the actors, so that few games spread over all of them.
        free = deque(actor for _ in range(self._seats) for actor in self._actors)
        running: dict[Any, tuple[int, int, Any]] = {}
        done = 0
        with draining() as drain:
            while True:
                while waiting and free and not drain.asked:
                    index, attempt = waiting.popleft()
                    actor = free.popleft()
                    running[_start(actor, games[index])] = (index, attempt, actor)
                if not running or drain.over:
                    break
                ready, _ = ray.wait(list(running), timeout=_POLL_S)
                for reference in ready:
                    index, attempt, actor = running.pop(reference)
                    result = _result(reference, games[index], attempt)
                    if isinstance(result, DIED):
                        free = deque(other for other in free if other != actor)
                        if not free and not running:
                            raise RunFailed(f"all players died: {str(result).splitlines()[0]}")
                    else:
                        free.append(actor)
                    if isinstance(result, Exception):
                        waiting.append((index, attempt + 1))
                    else:
                        results[index] = result
                        done += 1
                        on_played(games[index], *result)
                on_progress(done)
        return [result for result in results if result is not None]


def play_missing(
    players: Players,
    games: Sequence[Game],
    journal: Journal[Played],
    record: Callable[[Game, Trajectory, bool], Played],
    on_progress: Callable[[int], None],
) -> list[Played]:
    """The records of all games in their order: those in the journal, and those that are played now and added to it.

    Raises what `Players.play` raises.
    """
    known = {played.id: played for played in journal.records}
    missing = [game for game in games if game.episode.id not in known]

    def keep(game: Game, trajectory: Trajectory, success: bool) -> None:
        known[trajectory.id] = record(game, trajectory, success)
        journal.append(known[trajectory.id])

    before = len(games) - len(missing)
    on_progress(before)
    players.play(missing, lambda done: on_progress(before + done), keep)
    return [known[game.episode.id] for game in games]


@contextmanager
def players(config: RunConfig, policy: Path, generate: Generate) -> Iterator[Players]:
    """Start the player actors of a run; `policy` gives the tokenizer, which no round changes."""
    collect = config.collect
    _, longest_response = play_response(config)
    actors: list[Any] = []
    try:
        for index in range(collect.players):
            actor = player_actor(collect.seats, name=f"player-{index}", num_cpus=PLAYER_CPUS)
            actors.append(
                actor.remote(
                    policy=str(policy),
                    thinking=config.thinking,
                    generate=generate,
                    config=config.env,
                    max_prompt_tokens=config.engines.max_model_len - longest_response,
                    run_seed=config.seed,
                )
            )
        yield Players(actors, collect.seats)
    finally:
        for actor in actors:
            ray.kill(actor)


def _start(actor: Any, game: Game) -> Any:
    knowledge = game.knowledge
    # Games with the same knowledge share a long prefix; they are routed together.
    return actor.play.remote(
        game.episode,
        game.sampling,
        knowledge=knowledge.text if knowledge else "",
        key=knowledge.id if knowledge else None,
        sampling_seed=game.sampling_seed,
    )


def _result(reference: Any, game: Game, attempt: int) -> tuple[Trajectory, bool] | Exception:
    """The result of a finished call, or the error for which the game is to be played again."""
    try:
        result: tuple[Trajectory, bool] = ray.get(reference)  # ready
        return result
    except (RayTaskError, *DIED) as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if attempt < _ATTEMPTS and not isinstance(cause, EngineUnavailable):
            failed: Exception = error
            return failed
        raise RunFailed(f"game {game.episode.id} failed {attempt} times: {one_line(cause, 0)}") from error
