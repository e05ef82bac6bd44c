"""`python -m benchmarks.rollout --sweep`: how far players, pool and routing carry, on simulated engines.

Real players, pool and games; the engines only take their time (`Simulation`), so that the machine's cores are left to
our own code. In one JSON object, and in a figure:

- `seats`: responses' tokens per second for 1 to 64 games at a time, with one engine and with two, and the knee;
- `actors`: turns per second of 1 to 4 player actors on an engine that answers at once, and the knee;
- `routing`: the share of prompt tokens that the engines' prefix caches had, by routing policy;
- `turn_us`: microseconds that our layer adds to a turn, with one game at a time and with all actors busy; its parts.

A knee is the smallest number that gives nine tenths of the most that any gives.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import harness, serving
from benchmarks.collectors import some_players
from benchmarks.simulated import Simulation, simulated
from oel_ray.engines.router import Replica, Router
from oel_ray.envs import make
from oel_ray.models.resolve import resolve_model
from oel_ray.play.players import Game, Players, player_pool
from oel_ray.records import KnowledgeText, Trajectory
from oel_ray.text import prompts
from oel_ray.text.chat import ChatFormat

import ray  # isort: skip - behind what sets its environment

SEATS, ENGINES, ACTORS = (1, 2, 4, 8, 16, 32, 64), (1, 2), (1, 2, 3, 4)
SMALL_SEATS, SMALL_ACTORS = (1, 4), (1, 2)
KNEE = 0.9
SIMULATION: dict[str, float] = {"decode_step_s": 0.005, "decode_sequence_s": 0.00015}
AT_ONCE: dict[str, float] = {"decode_step_s": 0.0, "decode_sequence_s": 0.0, "prefill_tokens_per_s": float("inf")}
MOST = ["engines.max_num_seqs=64", "collect.players=1", f"collect.seats={SEATS[-1]}"]
ACTOR_SEATS = 4
ROUTING_ENGINES, ROUTING_TEXTS, ROUTING_TEXT_TOKENS = 4, 8, 1000
ROUTING_CACHE_TOKENS = 16_000
"""Of one engine: room for the knowledge texts of its share and its games, and not for everybody's."""
REPEATS = 200


class LeastLoaded(Router):
    """The replica with the fewest tokens in flight, wherever the prefix may be."""

    def choose(self, healthy: Sequence[Replica], home: Replica | None, tokens: int) -> Replica:
        return min(healthy, key=lambda replica: replica.load)


class Sticky(Router):
    """The replica that served the key last, however busy it is."""

    def choose(self, healthy: Sequence[Replica], home: Replica | None, tokens: int) -> Replica:
        return home or min(healthy, key=lambda replica: replica.load)


class InTurn(Router):
    """One replica after the other."""

    def choose(self, healthy: Sequence[Replica], home: Replica | None, tokens: int) -> Replica:
        self._asked = getattr(self, "_asked", -1) + 1
        return healthy[self._asked % len(healthy)]


ROUTERS: dict[str, type[Router]] = {"ours": Router, "sticky": Sticky, "least_loaded": LeastLoaded, "in_turn": InTurn}


class Sweep:
    """The parts of the sweep. `settings` change the quickstart."""

    def __init__(self, settings: Sequence[str], *, small: bool) -> None:
        self._settings, self._small = settings, small
        config = self._config()
        self._policy = resolve_model(config.model, serving.tell)
        self._replies = serving.move_replies(config, self._policy)
        self._games = serving.training_games(config, 4 if small else 4 * SEATS[-1])

    def seats(self) -> list[dict[str, Any]]:
        points = []
        for engines in ENGINES:
            config = self._config(*MOST, f"engines.count={engines}")
            with (
                serving.serving(config, engine=self._engine(SIMULATION)) as served,
                player_pool(config, served.policy, served.pool.client) as all_seats,
            ):
                all_seats.play(self._games[:1], lambda _: None)
                for seats in SMALL_SEATS if self._small else SEATS:
                    games = self._games[: max(4 * seats, 4)]
                    served.fresh()
                    seconds, played = _timed(some_players(1, seats), games)
                    points.append(
                        {"engines": engines, "seats": seats, "tokens_per_s": serving.response_tokens(played) / seconds}
                    )
                    serving.tell(str(points[-1]))
        return points

    def actors(self) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Turns per second by number of actors, and microseconds of a turn."""
        most = (SMALL_ACTORS if self._small else ACTORS)[-1]
        config = self._config(f"collect.players={most}", f"collect.seats={ACTOR_SEATS}", "engines.count=1")
        points = []
        with (
            serving.serving(config, engine=self._engine(AT_ONCE)) as served,
            player_pool(config, served.policy, served.pool.client) as all_actors,
        ):
            all_actors.play(self._games[: 2 * most], lambda _: None)
            for actors in range(1, most + 1):
                seconds, played = _timed(some_players(actors, ACTOR_SEATS), self._games)
                points.append({"actors": actors, "turns_per_s": _turns(played) / seconds})
                serving.tell(str(points[-1]))
            few = self._games[: 4 if self._small else 32]
            seconds, played = _timed(some_players(1, 1), few)
            return points, {"alone": 1e6 * seconds / _turns(played), **self._parts(served, played)}

    def routing(self) -> list[dict[str, Any]]:
        config = self._config(*MOST, f"engines.count={ROUTING_ENGINES}", "engines.max_model_len=8192")
        chat = ChatFormat.from_pretrained(self._policy, thinking=config.thinking)
        texts = [_text(chat, number) for number in range(ROUTING_TEXTS)]
        # As in an evaluation: half of the games with the knowledge texts in turn, half with none.
        games = [
            game._replace(knowledge=text if index % 2 else None)
            for index, (game, text) in enumerate(zip(self._games, itertools.cycle(texts), strict=False))
        ]
        rows = []
        for name, router in ROUTERS.items():
            with (
                serving.serving(config, engine=self._engine(SIMULATION), router=router) as served,
                player_pool(config, served.policy, served.pool.client) as gamers,
            ):
                gamers.play(games[:1], lambda _: None)
                served.fresh()
                seconds, played = _timed(gamers, games)
                counts = ray.get([engine.counts.remote() for engine in served.pool.engines()])
            total = {key: sum(count[key] for count in counts) for key in counts[0]}
            busiest = max(count["requests"] for count in counts) * len(counts) / total["requests"]
            rows.append(
                {
                    "policy": name,
                    "reused": round(total["reused_tokens"] / total["prompt_tokens"], 4),
                    "tokens_per_s": round(serving.response_tokens(played) / seconds, 1),
                    "busiest_over_mean": round(busiest, 3),
                }
            )
            serving.tell(str(rows[-1]))
        return rows

    def _parts(self, served: serving.Serving, played: Sequence[Trajectory]) -> dict[str, float]:
        """What one turn is made of, each part by itself, from this process."""
        game = max(played, key=lambda game: len(game.turns))
        config, turn = served.config, game.turns[-1]
        chat = ChatFormat.from_pretrained(served.policy, thinking=config.thinking)
        environment = make(game.env, game.seed, game.params)
        environment.reset()
        (engine,) = served.pool.engines()
        sampling, client = config.collect.sampling.sampling(), served.pool.client
        ids, deadline_s = turn.prompt_ids, config.engines.generate_deadline_s

        def prompt() -> None:
            chat.game_ids(prompts.game_situation(game.instructions, game.turns[:-1], turn.observation, game.template))

        return {
            "prompt": _each_us(prompt),
            "game_step": _each_us(lambda: environment.step("nothing to be read")),
            "engine_call": _each_async_us(lambda: engine.generate.remote(ids, sampling, 0, deadline_s)),
            "engine_call_with_lease": _each_async_us(lambda: client(ids, sampling, seed=0, key="a")),
        }

    def _engine(self, pace: dict[str, float]) -> Any:
        simulation = Simulation(self._replies, cache_tokens=ROUTING_CACHE_TOKENS)
        return simulated(replace(simulation, **pace))  # type: ignore[arg-type]

    def _config(self, *settings: str) -> Any:
        return serving.quickstart(*settings, *self._settings)


def measure(out: Path, settings: Sequence[str], *, small: bool) -> dict[str, Any]:
    """All parts, and the figure."""
    sweep = Sweep(settings, small=small)
    seats = sweep.seats()
    actors, turn_us = sweep.actors()
    turn_us["all_actors"] = 1e6 / max(point["turns_per_s"] for point in actors)
    line = {
        "name": "rollout_sweep",
        "machine": harness.machine("cpu"),
        "seats": [point | {"tokens_per_s": round(point["tokens_per_s"], 1)} for point in seats],
        "seats_knee": {
            engines: _knee({p["seats"]: p["tokens_per_s"] for p in seats if p["engines"] == engines})
            for engines in ENGINES
        },
        "actors": [point | {"turns_per_s": round(point["turns_per_s"], 1)} for point in actors],
        "actors_knee": _knee({point["actors"]: point["turns_per_s"] for point in actors}),
        "routing": sweep.routing(),
        "turn_us": {name: round(value) for name, value in turn_us.items()},
        "simulation": SIMULATION | {"cache_tokens": ROUTING_CACHE_TOKENS},
    }
    _plot(out / "rollout.svg", line)
    return line


def _timed(gamers: Players, games: Sequence[Game]) -> tuple[float, list[Trajectory]]:
    started = time.perf_counter()
    played = gamers.play(games, lambda _: None)
    return time.perf_counter() - started, [trajectory for trajectory, _ in played]


def _turns(games: Sequence[Trajectory]) -> int:
    return sum(len(game.turns) for game in games)


def _knee(rates: dict[int, float]) -> int:
    return min(size for size, rate in rates.items() if rate >= KNEE * max(rates.values()))


def _text(chat: ChatFormat, number: int) -> KnowledgeText:
    line = f"{prompts.ITEM_MARKER} fact {number} of the game."
    lines = [line] * (ROUTING_TEXT_TOKENS // chat.count(f"{line}\n") + 1)
    text = "\n".join(lines)
    return KnowledgeText(
        id=f"k{number:02d}",
        round=serving.ROUND,
        seed=number,
        format="structured",
        text=text,
        tokens=chat.count(text),
        items=[],
        steps=[],
    )


def _each_us(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(REPEATS):
        function()
    return 1e6 * (time.perf_counter() - started) / REPEATS


def _each_async_us(call: Callable[[], Awaitable[object]]) -> float:
    async def all_calls() -> float:
        await call()
        started = time.perf_counter()
        for _ in range(REPEATS):
            await call()
        return 1e6 * (time.perf_counter() - started) / REPEATS

    return asyncio.run(all_calls())


def _plot(file: Path, line: dict[str, Any]) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 3.6), layout="constrained")
    by_seats, by_actors, by_policy = canvas.subplots(1, 3)
    for engines, color, marker in zip(ENGINES, ("#d9822b", "#1f6f8b"), ("s-", "o-"), strict=True):
        points = [point for point in line["seats"] if point["engines"] == engines]
        seats, rates = [p["seats"] for p in points], [p["tokens_per_s"] for p in points]
        label = f"{engines} engine{'s' * (engines > 1)}, knee {line['seats_knee'][engines]}"
        by_seats.plot(seats, rates, marker, color=color, label=label)
        by_seats.set_xscale("log", base=2)
        by_seats.set_xticks(seats, [str(count) for count in seats])
    by_seats.set(xlabel="seats of one player actor", ylabel="tokens/s", ylim=(0, None))
    actors = [point["actors"] for point in line["actors"]]
    rates = [point["turns_per_s"] for point in line["actors"]]
    by_actors.plot(actors, rates, "o-", color="#1f6f8b", label=f"knee {line['actors_knee']}")
    by_actors.set_xticks(actors)
    by_actors.set(xlabel="player actors, engine answers at once", ylabel="turns/s", ylim=(0, None))
    policies = [row["policy"].replace("_", " ") for row in line["routing"]]
    by_policy.bar(policies, [100 * row["reused"] for row in line["routing"]], color="#1f6f8b")
    by_policy.set(xlabel=f"routing over {ROUTING_ENGINES} engines", ylabel="prompt tokens reused, %")
    for axes in (by_seats, by_actors):
        axes.grid(color="#dddddd")
        axes.legend(frameon=False)
    canvas.suptitle(f"Simulated engines, real players and games; {line['machine']}", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": file.stem}):  # the same figures give the same bytes
        canvas.savefig(file, metadata={"Date": None})
