"""`python -m benchmarks.lockstep`: wall time of games turn by turn in lock-step / the same games played by ours.

Lock-step sends the turns of all games to vLLM's `LLM.generate` together and steps the games when the last response is
there. Both ways have as many seats as games and play the very same games: float32 and the same sampling seeds, which is
checked. What is gained depends on how much slower an engine gets with the size of its batch; so the responses are also
said again, with their lengths, by a simulated engine that hardly gets slower (`simulated`). The last line is one JSON
object. The process is the driver of a Ray of its own.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks import harness, serving
from benchmarks.simulated import Simulation, simulated
from oel_ray.config.schema import RunConfig
from oel_ray.envs import Environment, make
from oel_ray.play.players import Game, Players, player_pool
from oel_ray.records import Generation, Sampling, Trajectory, Turn
from oel_ray.seeds import derive_seed
from oel_ray.text import prompts
from oel_ray.text.chat import ChatFormat

import ray  # isort: skip - behind what sets its environment

GOAL = ">= 1.5"
MODEL = "smollm2-135m"
"""A language model: its responses differ in length. Those of the micro model hardly do."""
FLOAT32 = ["policy_dtype=float32", "engines.dtype=float32", "engines.count=1", "collect.players=1"]
SIZE = [
    *FLOAT32,
    f"model={MODEL}",
    "thinking=false",
    "env.max_turns=4",
    "collect.seats=16",
    "collect.sampling.max_tokens=96",
]
SMALL = [*FLOAT32, "collect.seats=6"]
Respond = Callable[[Sequence[serving.Request], Sampling], Sequence[Generation]]


@dataclass
class _Board:
    """One of the games that go in lock-step."""

    game: Game
    environment: Environment
    observation: str
    turns: list[Turn] = field(default_factory=list)
    over: bool = False

    def step(self, request: serving.Request, generation: Generation) -> None:
        step = self.environment.step(generation.text)
        turn = Turn(
            observation=self.observation,
            response=generation.text,
            prompt_ids=request.prompt_ids,
            response_ids=generation.token_ids,
            action=step.action,
            feedback=step.feedback,
            weight_version=generation.weight_version,
            finish_reason=generation.finish_reason,
        )
        self.turns.append(turn)
        self.observation, self.over = step.feedback, step.done


def in_lockstep(games: Sequence[Game], config: RunConfig, chat: ChatFormat, respond: Respond) -> list[list[Turn]]:
    """Play games turn by turn; returns their turns."""
    boards = []
    for game in games:
        environment = make(game.episode.env, game.episode.seed, game.episode.params)
        boards.append(_Board(game, environment, environment.reset()))
    template = prompts.game_template(show_actions=config.env.show_actions)
    sampling = config.collect.sampling.sampling()
    for number in range(config.env.max_turns):
        going = [board for board in boards if not board.over]
        requests = []
        for board in going:
            situation = prompts.game_situation(board.environment.instructions, board.turns, board.observation, template)
            seed = derive_seed(config.seed, "play", board.game.episode.id, 0, number)
            requests.append(serving.Request(chat.game_ids(situation), seed, sampling.max_tokens))
        for board, request, generation in zip(going, requests, respond(requests, sampling), strict=True):
            board.step(request, generation)
    return [board.turns for board in boards]


def measure(config: RunConfig, runs: int) -> dict[str, Any]:
    """The benchmark's result."""
    games = serving.training_games(config, config.collect.players * config.collect.seats)
    with (
        serving.serving(config) as served,
        serving.plain_engines(config.engines, served.policy, on_gpu=served.on_gpu) as (plain,),
        player_pool(config, served.policy, served.pool.client) as gamers,
    ):

        def respond(requests: Sequence[serving.Request], sampling: Sampling) -> list[Generation]:
            answers: list[Generation] = ray.get(plain.respond.remote(requests, sampling))
            return answers

        def fresh() -> None:
            served.fresh()
            ray.get(plain.drop_cache.remote())

        pairs, played = _pairs(games, served, gamers, respond, fresh, runs)
    return harness.result(
        "lockstep",
        pairs,
        GOAL,
        harness.machine(served.device),
        unit="s",
        **pairs.medians("lockstep", "ours"),
        games=len(games),
        turns=sum(len(game.turns) for game in played),
        response_tokens=_lengths(played),
        simulated=_with_simulated_engine(config, games, played, runs),
    )


def _with_simulated_engine(
    config: RunConfig, games: Sequence[Game], played: Sequence[Trajectory], runs: int
) -> dict[str, Any]:
    """The same comparison with the recorded responses: a seed takes one of them, so that both ways get the same."""
    simulation = Simulation(serving.recorded_replies(played))
    with (
        serving.serving(config, engine=simulated(simulation)) as served,
        player_pool(config, served.policy, served.pool.client) as gamers,
    ):
        (engine,) = served.pool.engines()

        def respond(requests: Sequence[serving.Request], sampling: Sampling) -> Sequence[Generation]:
            async def together() -> list[Generation]:
                deadline_s = config.engines.generate_deadline_s
                calls: list[Awaitable[Generation]] = [
                    engine.generate.remote(request.prompt_ids, sampling, request.seed, deadline_s)
                    for request in requests
                ]
                return list(await asyncio.gather(*calls))

            return asyncio.run(together())

        pairs, replayed = _pairs(games, served, gamers, respond, served.fresh, runs)
    turns = sum(len(game.turns) for game in replayed)
    return serving.simulated_result(pairs, simulation, "lockstep", "ours") | {"turns": turns}


def _pairs(
    games: Sequence[Game],
    served: serving.Serving,
    gamers: Players,
    respond: Respond,
    fresh: Callable[[], None],
    runs: int,
) -> tuple[harness.Pairs, list[Trajectory]]:
    """Both ways, side by side, after one of ours that warms up; and the games.

    Raises:
        RuntimeError: the two ways did not play the same games.
    """
    config = served.config
    chat = ChatFormat.from_pretrained(served.policy, thinking=config.thinking)
    played = [trajectory for trajectory, _ in gamers.play(games, lambda _: None)]

    def lockstep() -> float:
        fresh()
        started = time.perf_counter()
        turns = in_lockstep(games, config, chat, respond)
        seconds = time.perf_counter() - started
        same = [_said(mine) == _said(game.turns) for mine, game in zip(turns, played, strict=True)]
        if not all(same):
            raise RuntimeError(f"{same.count(False)} of {len(same)} games went another way in lock-step")
        return seconds

    def ours() -> float:
        fresh()
        return harness.seconds(lambda: gamers.play(games, lambda _: None), "cpu")

    return harness.measure_pairs(lockstep, ours, runs), played


def _said(turns: Sequence[Turn]) -> list[list[int]]:
    return [turn.response_ids for turn in turns]


def _lengths(played: Sequence[Trajectory]) -> dict[str, float]:
    lengths = [len(turn.response_ids) for game in played for turn in game.turns]
    return {"shortest": min(lengths), "median": median(lengths), "longest": max(lengths)}


def main() -> None:
    options = serving.arguments("lockstep", __doc__, runs=3).parse_args()
    config = serving.quickstart(*(SMALL if options.small else SIZE), *options.settings)
    print(json.dumps(measure(config, options.runs)))


if __name__ == "__main__":
    main()
