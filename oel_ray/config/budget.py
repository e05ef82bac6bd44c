"""How many tokens a configuration leaves to prompts. Any process; pure."""

from typing import NamedTuple

from oel_ray.config.schema import RunConfig


class Reading(NamedTuple):
    """What stands in a context besides the prompt itself, at most, and the `keys` that say so."""

    name: str
    knowledge: int
    response: int
    response_key: str
    by_engine: bool = True
    """Else by the trainer, where the model's own context counts, not `engines.max_model_len`."""

    @property
    def keys(self) -> list[str]:
        return ["extract.max_tokens"] * (self.knowledge > 0) + [self.response_key]

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
    key, response = play_response(config)
    found = [Reading("play", 0, response, key)]
    if evaluate.enabled and evaluate.in_context:
        found.append(Reading("in context", extract.max_tokens, response, key))
    if extract.format != "raw":
        known = extract.max_tokens if extract.show_previous else 0
        found.append(Reading("extraction", known, extract.sampling.max_tokens, "extract.sampling.max_tokens"))
    key, written = "consolidate.sampling.max_tokens", config.consolidate.sampling.max_tokens
    if config.consolidate.responses == "teacher":
        found.append(Reading("off-policy", extract.max_tokens, written, key))
    found.append(Reading("teacher", extract.max_tokens, written, key, by_engine=False))
    return found
