"""What the benchmarks of engines, players and chains share: the parts of a run, started as a run starts them.

The process of a benchmark is the driver: Ray, engines and players live below it.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import oel_ray.cluster.session  # sets what Ray reads when it is imported

import ray  # isort: skip

from benchmarks import harness
from benchmarks.simulated import Reply, Simulation
from oel_ray.config.load import load_config
from oel_ray.config.precision import auto_here
from oel_ray.config.schema import EnginesConfig, RunConfig
from oel_ray.engines.client import Pool
from oel_ray.engines.engine import Engine, engine_args, prepare_cpu
from oel_ray.engines.pool import engine_pool
from oel_ray.engines.router import Router
from oel_ray.envs import make
from oel_ray.envs.splits import training_episodes
from oel_ray.models.resolve import resolve_model
from oel_ray.play.players import Game
from oel_ray.records import Generation, Sampling, Trajectory
from oel_ray.seeds import derive_seed
from oel_ray.text.chat import THINK_CLOSE, ChatFormat

ROUND = 1
VERSION = "r000"


class Request(NamedTuple):
    """What an engine was asked for, and how many tokens it wrote."""

    prompt_ids: list[int]
    seed: int
    tokens: int


@dataclass(frozen=True)
class Serving:
    """A pool of engines that serve the policy of a configuration."""

    config: RunConfig
    policy: Path
    pool: Pool
    on_gpu: bool

    @property
    def device(self) -> str:
        return "cuda" if self.on_gpu else "cpu"

    def fresh(self) -> None:
        """Empty the engines' prefix caches."""
        self.pool.deploy(self.policy, VERSION)


@contextmanager
def serving(config: RunConfig, *, engine: type = Engine, router: type[Router] = Router) -> Iterator[Serving]:
    policy = resolve_model(config.model, tell)
    with oel_ray.cluster.session.ray_cluster(config, "benchmark", tell) as on_gpu, ExitStack() as stack:
        pool = stack.enter_context(engine_pool(config.engines, policy, on_gpu=on_gpu, engine=engine, router=router))
        served = Serving(config, policy, pool, on_gpu)
        served.fresh()
        yield served


class PlainEngine:
    """vLLM's offline `LLM` with the arguments of our engine. An actor in an engine's place, with nothing around it."""

    def __init__(self, index: int, config: EnginesConfig, policy: str, *, on_gpu: bool) -> None:
        if not on_gpu:
            prepare_cpu(index, config)
            # It computes in this process, where torch has been loaded before its environment was set.
            torch.set_num_threads(config.cpu_threads)
        from vllm import LLM

        self._llm: Any = LLM(**engine_args(config, policy, on_gpu=on_gpu))

    def write_again(self, requests: Sequence[Request], sampling: Sampling) -> float:
        """Seconds for responses of the recorded lengths, all asked for at once, with an empty prefix cache."""
        self._llm.reset_prefix_cache()
        started = time.perf_counter()
        written = self._generate(requests, sampling, ignore_eos=True)
        seconds = time.perf_counter() - started
        lengths = [len(output.outputs[0].token_ids) for output in written]
        assert lengths == [request.tokens for request in requests]
        return seconds

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """The policy's own responses, of at most so many tokens."""
        tokenizer = self._llm.get_tokenizer()
        answers = []
        for written in self._generate(requests, sampling, ignore_eos=False):
            output = written.outputs[0]
            ids = list(output.token_ids)
            said = ids[:-1] if output.finish_reason == "stop" else ids
            text = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            reason = output.finish_reason or ""
            answers.append(Generation(token_ids=ids, text=text, finish_reason=reason, weight_version=VERSION))
        return answers

    def drop_cache(self) -> None:
        self._llm.reset_prefix_cache()

    def _generate(self, requests: Sequence[Request], sampling: Sampling, *, ignore_eos: bool) -> list[Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=request.tokens,
                ignore_eos=ignore_eos,
                seed=request.seed,
                output_kind=RequestOutputKind.FINAL_ONLY,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        outputs: list[Any] = self._llm.generate(prompts, params, use_tqdm=False)
        return outputs


@contextmanager
def plain_engines(config: EnginesConfig, policy: Path, *, on_gpu: bool) -> Iterator[list[Any]]:
    """As many plain engines as a pool has. They work while it does not, so they ask Ray for no CPUs of their own;
    but they hold a model, so on GPUs they need as many again.
    """
    actor = ray.remote(num_cpus=0, num_gpus=config.tensor_parallel if on_gpu else 0)(PlainEngine)
    actors: list[Any] = [actor.remote(index, config, str(policy), on_gpu=on_gpu) for index in range(config.count)]
    try:
        ray.get([plain.drop_cache.remote() for plain in actors])
        yield actors
    finally:
        for plain in actors:
            ray.kill(plain)


def write_again(plain: Sequence[Any], requests: Sequence[Request], sampling: Sampling) -> float:
    """Seconds that plain engines take, the requests dealt out to them in turn."""
    shares = [requests[index :: len(plain)] for index in range(len(plain))]
    each = [engine.write_again.remote(share, sampling) for engine, share in zip(plain, shares, strict=True) if share]
    return float(max(ray.get(each)))


def training_games(config: RunConfig, count: int) -> list[Game]:
    episodes = training_episodes(config.env, config.seed, ROUND, "consolidation", count, set())
    return [Game(episode, config.collect.sampling.sampling()) for episode in episodes]


def requests_of(games: Iterable[tuple[Trajectory, int]], run_seed: int) -> list[Request]:
    """The requests of games with their sampling seeds: all first turns, then all second ones.

    In this order the prefix of a turn has been computed before it is asked for.
    """
    turns = [
        (number, Request(turn.prompt_ids, derive_seed(run_seed, "play", game.id, seed, number), len(turn.response_ids)))
        for game, seed in games
        for number, turn in enumerate(game.turns)
    ]
    return [request for _, request in sorted(turns, key=lambda turn: turn[0])]


def response_tokens(games: Iterable[Trajectory]) -> int:
    return sum(len(turn.response_ids) for game in games for turn in game.turns)


def recorded_replies(games: Iterable[Trajectory]) -> tuple[Reply, ...]:
    """What was said in games, for simulated engines to say again."""
    return tuple(Reply(turn.response, tuple(turn.response_ids)) for game in games for turn in game.turns)


def move_replies(config: RunConfig, policy: Path, count: int = 512) -> tuple[Reply, ...]:
    """Legal moves behind empty thoughts of random lengths, the longest as long as a response may be."""
    tokenizer = ChatFormat.from_pretrained(policy, thinking=config.thinking).tokenizer
    episode = training_games(config, 1)[0].episode
    actions = make(episode.env, episode.seed, episode.params).actions
    rng = random.Random(config.seed)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def reply() -> Reply:
        answer = ids(f"{THINK_CLOSE if config.thinking else ''}{rng.choice(actions)}")
        longest = config.collect.sampling.max_tokens - len(answer) - 1
        said = [*ids("\n")[-1:] * rng.randint(longest // 8, longest), *answer]
        return Reply(tokenizer.decode(said), (*said, tokenizer.eos_token_id))

    return tuple(reply() for _ in range(count))


def simulated_result(pairs: harness.Pairs, simulation: Simulation, above: str, below: str) -> dict[str, Any]:
    """What a benchmark says of the same comparison with a simulated engine."""
    return {
        "ratio": round(pairs.ratio, 3),
        "spread": [round(ratio, 3) for ratio in pairs.spread],
        **pairs.medians(above, below),
        "decode_step_s": simulation.decode_step_s,
        "decode_sequence_s": simulation.decode_sequence_s,
        "prefill_tokens_per_s": simulation.prefill_tokens_per_s,
    }


def arguments(name: str, about: str | None, runs: int) -> argparse.ArgumentParser:
    """The options that these benchmarks have in common."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a size that says nothing, to try the benchmark")
    parser.add_argument("--runs", type=int, default=runs, help="pairs of measurements")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="changed settings of the quickstart")
    return parser


def quickstart(*settings: str) -> RunConfig:
    """The configuration that these benchmarks start from; later settings win."""
    return load_config("quickstart", list(settings)).settled(auto_here().precision)


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
