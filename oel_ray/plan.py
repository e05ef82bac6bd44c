"""What a configuration asks for, worked out from the configuration alone. Any process; pure.

`oel config` prints it below the configuration, `oel run` says the most of it before it starts, and `oel_ray.preflight`
adds the length of real prompts to it.
"""

from dataclasses import dataclass
from typing import NamedTuple

from oel_ray.config import RunConfig
from oel_ray.layout import planned_stages


@dataclass(frozen=True)
class Demand:
    """What a run asks of Ray: logical CPUs and GPUs, all stages' actors at once.

    Engines and players live as long as the run; extraction workers and training ranks take turns.
    """

    engine_cpus: int
    player_cpus: int
    worker_cpus: int
    engine_gpus: int = 0
    rank_gpus: int = 0

    @property
    def cpus(self) -> int:
        return self.engine_cpus + self.player_cpus + self.worker_cpus

    @property
    def gpus(self) -> int:
        return self.engine_gpus + self.rank_gpus


def demand(config: RunConfig, *, on_gpu: bool) -> Demand:
    engines, ranks = config.engines, config.consolidate.workers
    return Demand(
        engine_cpus=engines.count if on_gpu else engines.count * engines.cpu_threads,
        player_cpus=config.collect.players,
        worker_cpus=max(config.extract.workers, ranks),
        engine_gpus=engines.count * engines.tensor_parallel if on_gpu else 0,
        rank_gpus=ranks if on_gpu else 0,
    )


class Reading(NamedTuple):
    """What stands in a context besides the prompt itself, at most, and the keys that say so."""

    name: str
    knowledge: int
    response: int
    keys: tuple[str, ...]
    by_engine: bool = True
    """Else by the trainer, where the model's own context counts, not `engines.max_model_len`."""

    @property
    def tokens(self) -> int:
        return self.knowledge + self.response


def play_response(config: RunConfig) -> tuple[str, int]:
    """The longest response of a game, the one bound of all games of a player: the key that says so, and its tokens."""
    samplings = {
        "collect.sampling": config.collect.sampling,
        "collect.extraction_sampling": config.collect.sampling_for("extraction"),
        "evaluate.sampling": config.evaluate.sampling,
    }
    key, longest = max(samplings.items(), key=lambda item: item[1].max_tokens)
    return f"{key}.max_tokens", longest.max_tokens


def readings(config: RunConfig) -> list[Reading]:
    """The ways in which a model reads a prompt in a run, those that it makes use of."""
    extract, evaluate = config.extract, config.evaluate
    response_key, response = play_response(config)
    keys: tuple[str, ...]
    found = [Reading("play", 0, response, (response_key,))]
    if evaluate.enabled and evaluate.in_context:
        keys = ("extract.max_tokens", response_key)
        found.append(Reading("in context", extract.max_tokens, response, keys))
    if extract.format != "raw":
        known = extract.max_tokens if extract.show_previous else 0
        keys = (*["extract.max_tokens"] * extract.show_previous, "extract.sampling.max_tokens")
        found.append(Reading("extraction", known, extract.sampling.max_tokens, keys))
    keys, written = ("extract.max_tokens", "consolidate.sampling.max_tokens"), config.consolidate.sampling.max_tokens
    if config.consolidate.responses == "teacher":
        found.append(Reading("off-policy", extract.max_tokens, written, keys))
    found.append(Reading("teacher", extract.max_tokens, written, keys, by_engine=False))
    return found


class Sizes(NamedTuple):
    """How much a run does. Samples are at most: games may end early."""

    stages: int
    games: int
    extractions: int
    samples: int
    policy_games: int
    in_context_games: int

    @classmethod
    def of(cls, config: RunConfig) -> "Sizes":
        """All but `stages` count for one round."""
        evaluate = config.evaluate
        last = config.collect.extraction_games
        policy_games = evaluate.maps * evaluate.seeds if evaluate.enabled else 0
        return cls(
            stages=sum(len(planned_stages(config, number)) for number in range(config.rounds + 1)),
            games=sum(config.training_games.values()),
            extractions=0 if config.extract.format == "raw" else config.extract.seeds * config.collect.extraction_games,
            samples=config.consolidate.games * config.env.max_turns,
            policy_games=policy_games,
            in_context_games=policy_games * len({*evaluate.accumulation_steps, last}) if evaluate.in_context else 0,
        )


def headline(config: RunConfig) -> str:
    sizes = Sizes.of(config)
    return (
        f"{sizes.stages} stages in rounds 0 to {config.rounds}; a round: {sizes.games} games to learn from, "
        f"{sizes.extractions} extractions, at most {sizes.samples} training samples, "
        f"{sizes.policy_games + sizes.in_context_games} evaluation games"
    )


def explain(config: RunConfig) -> list[str]:
    """The derived sizes, a line each."""
    sizes, rounds, device = Sizes.of(config), config.rounds, config.engines.device
    collect, consolidate, extract = config.collect, config.consolidate, config.extract
    evaluations = (rounds + 1) * sizes.policy_games + rounds * sizes.in_context_games
    rows = [
        ("stages", f"{sizes.stages} in rounds 0 to {rounds}"),
        (
            "games",
            f"T = {collect.extraction_games} and T' = {consolidate.games} a round, {rounds * sizes.games} in all",
        ),
        ("extraction", f"K x T = {extract.seeds} x {collect.extraction_games}, {sizes.extractions} responses a round"),
        (
            "training",
            f"{consolidate.games_per_step} games x {config.env.max_turns} turns, at most "
            f"{sizes.samples // consolidate.steps} samples a step and {sizes.samples} a round",
        ),
        (
            "evaluation",
            f"{sizes.policy_games} games of the policy and {sizes.in_context_games} in context a round, "
            f"{evaluations} games in all",
        ),
    ]
    if device != "cuda":
        rows.append(("on CPUs", _shares(demand(config, on_gpu=False))))
    if device != "cpu":
        rows.append(("on GPUs", _shares(demand(config, on_gpu=True))))
    rows.append(("tokens", f"at most, beside the prompt; engines.max_model_len={config.engines.max_model_len}"))
    return [f"{name:<12} {text}" for name, text in rows + [_row(reading, config) for reading in readings(config)]]


def _shares(needed: Demand) -> str:
    text = (
        f"{needed.cpus} logical CPUs: {needed.engine_cpus} for engines, {needed.player_cpus} for players, "
        f"{needed.worker_cpus} for extraction workers or training ranks"
    )
    if not needed.gpus:
        return text
    return f"{needed.gpus} GPUs: {needed.engine_gpus} for engines, {needed.rank_gpus} for training ranks; {text}"


def _row(reading: Reading, config: RunConfig) -> tuple[str, str]:
    text = f"{reading.response} of response"
    if reading.knowledge:
        text = f"{reading.knowledge} of knowledge + {text} = {reading.tokens}"
    if reading.by_engine:
        return f"  {reading.name}", f"{text}; {config.engines.max_model_len - reading.tokens} are left to the prompt"
    return f"  {reading.name}", f"{text}; the model's own context holds the prompt, too"
