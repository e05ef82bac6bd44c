"""The sizes of a run that follow from its configuration. Any process; pure."""

from typing import NamedTuple

from oel_ray.cluster.demand import TURNS, Demand, amounts, demands, total
from oel_ray.config.budget import Budget, budgets
from oel_ray.config.precision import Auto, precisions
from oel_ray.config.schema import RunConfig
from oel_ray.runs.schedule import planned_stages


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
        evaluate, games = config.evaluate, config.collect.extraction_games
        policy_games = evaluate.maps * evaluate.seeds if evaluate.enabled else 0
        return cls(
            stages=sum(len(planned_stages(config, number)) for number in range(config.rounds + 1)),
            games=sum(config.training_games.values()),
            extractions=0 if config.extract.format == "raw" else config.extract.seeds * games,
            samples=config.consolidate.games * config.env.max_turns,
            policy_games=policy_games,
            in_context_games=policy_games * len({*evaluate.accumulation_steps, games}) if evaluate.in_context else 0,
        )


def headline(config: RunConfig) -> str:
    sizes = Sizes.of(config)
    return (
        f"{sizes.stages} stages in rounds 0 to {config.rounds}; a round: {sizes.games} games to learn from, "
        f"{sizes.extractions} extractions, at most {sizes.samples} training samples, "
        f"{sizes.policy_games + sizes.in_context_games} evaluation games"
    )


def explain(config: RunConfig, auto: Auto) -> list[str]:
    """The derived sizes, a line each, and what the precision `auto` stands for on this machine."""
    sizes, rounds, device = Sizes.of(config), config.rounds, config.engines.device
    collect, consolidate, extract = config.collect, config.consolidate, config.extract
    evaluations = (rounds + 1) * sizes.policy_games + rounds * sizes.in_context_games
    rows = {
        "stages": f"{sizes.stages} in rounds 0 to {rounds}",
        "games": f"T = {collect.extraction_games} and T' = {consolidate.games} a round, {rounds * sizes.games} in all",
        "extraction": f"K x T = {extract.seeds} x {collect.extraction_games}, {sizes.extractions} responses a round",
        "training": f"{consolidate.games_per_step} games x {config.env.max_turns} turns, at most "
        f"{sizes.samples // consolidate.steps} samples a step and {sizes.samples} a round",
        "evaluation": f"{sizes.policy_games} games of the policy and {sizes.in_context_games} in context a round, "
        f"{evaluations} games in all",
    }
    if device != "cuda":
        rows["on CPUs"] = _shares(demands(config, on_gpu=False))
    if device != "cpu":
        rows["on GPUs"] = _shares(demands(config, on_gpu=True))
    if "auto" in precisions(config).values():
        rows["precision"] = f"auto stands for {'bfloat16, on GPUs' if device == 'cuda' else auto}"
        if device == "auto":
            rows["precision"] += "; for bfloat16 on GPUs"
    rows["tokens"] = f"at most, beside the prompt; engines.max_model_len={config.engines.max_model_len}"
    rows |= {f"  {budget.name}": _room(budget, config) for budget in budgets(config)}
    return [f"{name:<12} {text}" for name, text in rows.items()]


def _shares(wanted: list[Demand]) -> str:
    return f"{amounts(total(wanted))} for {', '.join(map(str, wanted))}; {' and '.join(TURNS)} take turns"


def _room(budget: Budget, config: RunConfig) -> str:
    text = f"{budget.response} of response"
    if budget.knowledge:
        text = f"{budget.knowledge} of knowledge + {text} = {budget.tokens}"
    if budget.by_engine:
        return f"{text}; {config.engines.max_model_len - budget.tokens} are left to the prompt"
    return f"{text}; the model's own context holds the prompt, too"
