"""Compute the tokens that a configuration leaves to prompts. Any process; pure.

The schema, preflight, the player and `oel config` all use this module, so that none refuses what another allows.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from oel_ray.config.schema import RunConfig


class Budget(NamedTuple):
    """The most tokens in a context besides the prompt itself, for one use of a model in a run."""

    name: str
    knowledge: int
    response: int
    response_key: str
    by_engine: bool = True
    """False for the trainer, which is limited by the model's own context and not by `engines.max_model_len`."""

    @property
    def keys(self) -> list[str]:
        """The settings to lower if there is no room."""
        return ["extract.max_tokens", self.response_key] if self.knowledge else [self.response_key]

    @property
    def tokens(self) -> int:
        return self.knowledge + self.response


def play_response(config: "RunConfig") -> tuple[str, int]:
    """Find the longest response of a game, the one bound of all games of a player: its key, and its tokens."""
    samplings = {
        "collect.sampling": config.collect.sampling,
        "collect.extraction_sampling": config.collect.sampling_for("extraction"),
    }
    if config.evaluate.enabled:
        samplings["evaluate.sampling"] = config.evaluate.sampling
    key, longest = max(samplings.items(), key=lambda item: item[1].max_tokens)
    return f"{key}.max_tokens", longest.max_tokens


def budgets(config: "RunConfig") -> list[Budget]:
    """List the budgets of a run, one for each of its uses of a model."""
    extract, evaluate = config.extract, config.evaluate
    key, response = play_response(config)
    found = [Budget("play", 0, response, key)]
    if evaluate.enabled and evaluate.in_context:
        found.append(Budget("in context", extract.max_tokens, response, key))
    if extract.format != "raw":
        known = extract.max_tokens if extract.show_previous else 0
        found.append(Budget("extraction", known, extract.sampling.max_tokens, "extract.sampling.max_tokens"))
    key, written = "consolidate.sampling.max_tokens", config.consolidate.sampling.max_tokens
    if config.consolidate.responses == "teacher":
        found.append(Budget("off-policy", extract.max_tokens, written, key))
    else:
        found.append(Budget("student", 0, written, key))
    found.append(Budget("teacher", extract.max_tokens, written, key, by_engine=False))
    return found
