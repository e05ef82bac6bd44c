"""Play many games on player actors with many seats each. Runs in the driver.

A seat takes the next game as soon as its own has ended, so nothing waits for the slowest game of a batch. Games that
fail and games of a player that dies are played again. They go to another player if one has a free seat.
"""

import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ray
from ray.exceptions import RayTaskError

from oel_ray.cluster.actors import DIED, failure
from oel_ray.cluster.demand import ray_options
from oel_ray.cluster.stacks import WATCH, dump_stacks
from oel_ray.config.schema import CollectConfig, RunConfig
from oel_ray.errors import EngineUnavailable, EnvironmentFailed, RunFailed
from oel_ray.play.player import player_actor
from oel_ray.records import Episode, Frame, Generate, KnowledgeText, Sampling, Trajectory
from oel_ray.runs.journal import Journal
from oel_ray.stopping import draining
from oel_ray.telemetry.series import Series, report

_POLL_S = 0.5
_ATTEMPTS = 3
_ERRORS_IN_ANY_CASE = 5
_DIED = "a player died"
_START_S = 300.0
"""Seconds that a starting player may take to answer while no other player has a seat."""

Played = TypeVar("Played", bound=Trajectory)


class Game(NamedTuple):
    """An episode to be played, with its sampling and the knowledge text in its prompt."""

    episode: Episode
    sampling: Sampling
    knowledge: KnowledgeText | None = None
    sampling_seed: int = 0


class _Try(NamedTuple):
    """One attempt at a game: its index in the list, the number of the attempt, and the player where it failed last."""

    game: int
    number: int = 1
    failed_at: Any = None


@dataclass
class Players:
    """The player actors of a run, and the failures of players and games.

    `start` creates the given number of extra players, which live for one `play`.
    """

    actors: Sequence[Any]
    seats: int
    limits: CollectConfig = field(default_factory=CollectConfig)
    start: Callable[[int], Sequence[Any]] = lambda count: []
    failures: list[str] = field(default_factory=list)

    def play(
        self,
        games: Sequence[Game],
        on_progress: Callable[[int], None],
        on_played: Callable[[Game, Trajectory, bool], None] = lambda game, trajectory, success: None,
    ) -> list[tuple[Trajectory, bool]]:
        """Play all games; returns trajectory and success of each, in the order of `games`.

        `on_played` is called for each game as soon as it has ended.

        Raises:
            RunFailed: a game failed three times, or there were more failures than `collect.max_error_rate` allows.
                The message names the game or the most frequent error.
            KeyboardInterrupt: the run was asked to stop. Games in play may end first, see `draining`.
        """
        useful = min(math.ceil(len(games) / self.seats), self.limits.max_players)
        more = self.start(max(useful - len(self.actors), 0))
        playing = _Playing(self, games, on_played)
        for actor in more:  # Ray may start some only once a node has room
            playing.invite(actor)
        try:
            with draining() as drain:
                while playing.done < len(games) and not drain.over and (playing.running or not drain.asked):
                    playing.step(begin=not drain.asked)
                    on_progress(playing.done)
        finally:  # the next stage may need their resources
            for actor in more:
                ray.kill(actor)
        return [result for result in playing.results if result is not None]

    def pop_failures(self) -> dict[str, int]:
        """Count the failures of each kind since the last call, and forget them."""
        kinds = Counter(map(_kind, self.failures))
        self.failures.clear()
        return dict(kinds)


class _Playing:
    """Run many games at once. State: the game of every seat. Ray restarts actors that died."""

    def __init__(
        self, players: Players, games: Sequence[Game], on_played: Callable[[Game, Trajectory, bool], None]
    ) -> None:
        self.results: list[tuple[Trajectory, bool] | None] = [None] * len(games)
        self.done = 0
        self._games, self._seats, self._on_played = games, players.seats, on_played
        self._limits, self._failures = players.limits, players.failures
        self._allowed = max(_ERRORS_IN_ANY_CASE, int(self._limits.max_error_rate * len(games)))
        self._failed_before = len(self._failures)
        self._lost: list[Any] = []
        self._waiting = deque(_Try(game) for game in range(len(games)))
        self.running: dict[Any, tuple[_Try, Any]] = {}
        # Seats alternate between the actors, so that even a few games spread over all of them.
        self._free = deque(actor for _ in range(players.seats) for actor in players.actors)
        # Watchdog calls that are not answered yet: the player, the time, and the seats that it gets with its answer.
        self._watches: dict[Any, tuple[Any, float, int]] = {}
        for actor in players.actors:
            self._watch(actor)

    def step(self, *, begin: bool) -> None:
        """Start games on free seats if `begin`, then handle results that are ready. Returns within about a second."""
        while begin and self._waiting and self._free:
            self._start(self._waiting.popleft())
        # Handle watchdog answers first, because a steady stream of results would starve them.
        ready, _ = ray.wait([*self._watches, *self.running], timeout=_POLL_S)
        for reference in ready:
            if reference in self._watches:
                self._take_watch(reference)
            else:
                self._take_result(reference)
        silent_s = self._limits.step_deadline_s + _START_S
        for actor, asked, seats in list(self._watches.values()):
            if time.monotonic() - asked > silent_s:
                if not seats:
                    self._lose(actor, "a player did not answer")
                elif not self.running and not self._free:
                    raise RunFailed(f"no player came up within {silent_s:.0f} s: no node that is left has room for one")

    def _start(self, this: _Try) -> None:
        actor = next((actor for actor in self._free if actor != this.failed_at), self._free[0])
        self._free.remove(actor)
        game, knowledge = self._games[this.game], self._games[this.game].knowledge
        # Games with the same knowledge share a long prefix; they are routed together.
        text, key = (knowledge.text, knowledge.id) if knowledge else ("", None)
        play = actor.play.options(max_task_retries=0)
        self.running[play.remote(game.episode, game.sampling, text, key, game.sampling_seed)] = this, actor

    def invite(self, actor: Any) -> None:
        """Give a player its seats after its first answer."""
        self._watch(actor, self._seats)

    def _watch(self, actor: Any, seats: int = 0) -> None:
        # For an invited player Ray retries this call on the restarted actor, so an answer only means that a new
        # player is up. The delay of one second lets the killed process exit.
        deadline_s, retries = (1.0, -1) if seats else (self._limits.step_deadline_s, 0)
        stuck = actor.stuck.options(concurrency_group=WATCH, max_task_retries=retries)
        self._watches[stuck.remote(deadline_s)] = actor, time.monotonic(), seats

    def _take_watch(self, reference: Any) -> None:
        actor, _, seats = self._watches.pop(reference)
        try:
            stuck: str = ray.get(reference)  # ready
        except DIED as error:
            self._lose(actor, f"{_DIED}: {failure(error)}")
            return
        if stuck:
            self._lose(actor, "an environment hung", stuck)
        else:
            self._free.extend([actor] * seats)
            self._watch(actor)

    def _take_result(self, reference: Any) -> None:
        this, actor = self.running[reference]
        try:
            self.results[this.game] = result = ray.get(reference)  # ready
            self.done += 1
            report(Series.EPISODES, 1, status=result[0].ended_by)
            report(Series.TURNS, len(result[0].turns))
        except DIED as error:
            self._lose(actor, f"{_DIED}: {failure(error)}")
            return
        except RayTaskError as error:
            if isinstance(error.cause, EngineUnavailable):
                raise RunFailed(f"game {self._games[this.game].episode.id}: {error.cause}") from error
            raised = isinstance(error.cause, EnvironmentFailed)
            self._again(this, actor, f"an environment raised {error.cause}" if raised else failure(error))
        else:
            self._on_played(self._games[this.game], *result)
        del self.running[reference]
        self._free.append(actor)

    def _lose(self, actor: Any, what: str, episode: str = "") -> None:
        """Kill a player and queue its games again. `episode` is the game at fault, if that is known."""
        if not what.startswith(_DIED):
            dump_stacks()
            ray.kill(actor, no_restart=False)
        for reference, (this, at) in list(self.running.items()):
            if at == actor:
                del self.running[reference]
                if self._games[this.game].episode.id == episode:
                    self._again(this, actor, what)
                else:
                    self._waiting.appendleft(this._replace(failed_at=actor))
        self._free = deque(other for other in self._free if other != actor)
        self._watches = {reference: watch for reference, watch in self._watches.items() if watch[0] != actor}
        self.invite(actor)
        if not episode:
            if actor not in self._lost:  # the first loss of a player may be its node's fault
                self._lost.append(actor)
            self._count(what)

    def _again(self, this: _Try, actor: Any, what: str) -> None:
        """Queue a game again that failed by its own fault."""
        if this.number == _ATTEMPTS:
            raise RunFailed(f"game {self._games[this.game].episode.id} failed {_ATTEMPTS} times: {what}")
        self._waiting.append(_Try(this.game, this.number + 1, actor))
        self._count(what)

    def _count(self, what: str) -> None:
        self._failures.append(what)
        report(Series.EPISODES, 1, status=_kind(what))
        failures = self._failures[self._failed_before :]
        if len(failures) - len(self._lost) > self._allowed:
            kinds = Counter(map(_kind, failures))
            most = max(failures, key=lambda failure: kinds[_kind(failure)])
            allowed = f"collect.max_error_rate={self._limits.max_error_rate:g} allows {self._allowed}"
            raise RunFailed(f"{len(failures)} failures, and {allowed}; {kinds[_kind(most)]} times {most}")


def play_missing(
    players: Players,
    games: Sequence[Game],
    journal: Journal[Played],
    record: Callable[[Game, Trajectory, bool], Played],
    on_progress: Callable[[int], None],
) -> list[Played]:
    """Play the games that the journal lacks and add them to it. Returns the records of all games, in order.

    Raises:
        RunFailed, KeyboardInterrupt: see `Players.play`.
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
def player_pool(config: RunConfig, policy: Path, generate: Generate, frame: Frame | None = None) -> Iterator[Players]:
    """Start the player actors of a run, and kill them at the end.

    `policy` provides the tokenizer, which no round changes. `frame` is the run's own, see `ChatFormat`.
    """
    collect, resources = config.collect, ray_options(config.collect.resources)
    numbers = itertools.count()

    def start(count: int) -> list[Any]:
        actors = [player_actor(collect.seats, name=f"player-{next(numbers)}", **resources) for _ in range(count)]
        return [actor.remote(policy, generate, config, frame) for actor in actors]

    actors = start(collect.players)
    try:
        yield Players(actors, collect.seats, collect, start)
    finally:
        for actor in actors:
            ray.kill(actor)


def _kind(what: str) -> str:
    """Strip the details from a failure."""
    return what.partition(":")[0]
