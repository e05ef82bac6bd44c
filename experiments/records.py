"""The nouns of an experiment: what is run, what is measured, what is claimed. Any process; imports no Ray or torch."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from oel_ray.config.load import load_config
from oel_ray.config.schema import RunConfig
from oel_ray.records import Record

ROUND = 1
"""The round that imports go into: only there the policies of two runs are the same one."""

Imported = Literal["extraction", "consolidation", "knowledge"]
Condition = Literal["policy", "in_context", "out_of_distribution"]


class Recipe(Record):
    """How a run is made: `oel run PRESET OVERRIDES`, with what round 1 takes from other runs of the same seed.

    Its name is that of its folder: recipes of one name must be equal.
    """

    name: str
    preset: str
    overrides: tuple[str, ...]
    imports: "tuple[Import, ...]" = ()

    @cached_property
    def config(self) -> RunConfig:
        """Without a seed. Raises `UserError` for a key or value that the configuration does not take."""
        return load_config(self.preset, list(self.overrides))

    def with_sources(self) -> "list[Recipe]":
        """This recipe behind all that it imports from, each once."""
        found: list[Recipe] = []
        for source in [recipe for item in self.imports for recipe in item.source.with_sources()]:
            if source not in found:
                found.append(source)
        return [*found, self]


class Import(Record):
    """What one round of another run left behind: its games to extract from, its games to practise on, its texts."""

    source: Recipe
    round: int
    what: Imported


class Arm(Record):
    """One way that an experiment compares; only the first `rounds` of its run are looked at."""

    label: str
    recipe: Recipe
    rounds: int


class Key(NamedTuple):
    """What a measurement is of; see `Point`."""

    condition: Condition
    round: int
    step: int | None


class Point(Record):
    """One measurement of one policy.

    `round` 0 is the untouched model. `step` counts the trajectories that a text in the prompt was made of, or for a
    bare policy the optimizer steps of its round; None is all of them. `place` is where it stands in the course of the
    run, in rounds. `rate` is the share of games won, or of prompts done right; `error` its standard error within this
    one run. `source` is the file that says so, below the folder of the runs, with the first digits of its sha256.
    """

    condition: Condition
    round: int
    step: int | None
    place: float
    rate: float
    error: float
    count: int
    tokens_per_turn: float | None
    source: str
    sha256: str

    @property
    def key(self) -> Key:
        return Key(self.condition, self.round, self.step)


class ArmResult(Record):
    """What one arm came to with one seed, and where the numbers are from.

    `preset` and `settings` are the command's `--preset` and `--set`, `seeds` its `--seeds`, `arms` all arms that the
    experiment has: what else there should be. `run_id` is the run's own, `settings_hash` is of its configuration
    without the seed and `model_hash` of its untouched model: repetitions have both in common. `machine` is that of the
    process that read the run. `wall_s` is the sum of the run's stages, each since it was last started;
    `knowledge_tokens` the mean length of a text, by round, and `knowledge_hash` is of the words of a round's texts:
    arms with the same one were told the same. `random` and `oracle` are those players' rates on the maps of this seed,
    null where an environment has none.
    """

    experiment: str
    arm: str
    preset: str
    settings: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    seed: int
    command: str
    run_id: str
    settings_hash: str
    model_hash: str
    packages: dict[str, str]
    machine: str
    wall_s: float
    knowledge_tokens: dict[int, float]
    knowledge_hash: dict[int, str]
    random: float | None
    oracle: float | None
    points: tuple[Point, ...]

    @property
    def file_name(self) -> str:
        return f"{Start(self.preset).name}.{self.experiment}.{self.arm}.seed-{self.seed}.json"

    def find(self, key: Key) -> Point | None:
        return next((point for point in self.points if point.key == key), None)

    def point(self, condition: Condition, number: int, step: int | None = None) -> Point:
        """Raises `LookupError` if that was not measured."""
        if point := self.find(Key(condition, number, step)):
            return point
        raise LookupError(f"{self.experiment}, {self.arm}: not measured: {condition}, round {number}, step {step}")

    def steps(self, condition: Condition, number: int) -> list[int]:
        """The steps inside a round that were measured, in order."""
        keys = [point.key for point in self.points]
        return sorted(key.step for key in keys if key.step is not None and key[:2] == (condition, number))

    def rate(self, condition: Condition, number: int, step: int | None = None) -> float:
        return self.point(condition, number, step).rate

    def tokens(self, condition: Condition, number: int) -> float:
        """Tokens of a response; raises `LookupError` if that was not measured."""
        tokens = self.point(condition, number).tokens_per_turn
        if tokens is None:
            raise LookupError(f"{self.experiment}, {self.arm}: no lengths of responses")
        return tokens


Arms = Mapping[str, ArmResult]
"""The results of one seed by the labels of their arms."""


class Claim(NamedTuple):
    """A sentence of the paper, and the number that decides it, from the results of one seed.

    It holds where the number is positive, or, with `within`, where it is no further from zero than that. It is a
    difference of rates, or `in_tokens`.
    """

    text: str
    number: Callable[[Arms], float]
    within: float | None = None
    in_tokens: bool = False


class Start(NamedTuple):
    """What all arms of an experiment start from: a preset or YAML file, and what is changed in it for all of them."""

    preset: str
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What files and folders are called after it. The dots of `qwen3-1.7b` begin no suffix."""
        return Path(self.preset).name.removesuffix(".yaml")

    @property
    def config(self) -> RunConfig:
        """Raises `UserError` for what the configuration does not take."""
        return load_config(self.preset, list(self.settings))

    def recipe(self, name: str, *overrides: str, imports: tuple[Import, ...] = ()) -> Recipe:
        return Recipe(name=name, preset=self.preset, overrides=(*self.settings, *overrides), imports=imports)


class Experiment(NamedTuple):
    """What `python -m experiments.NAME` does. Its arms are compared with `reference`, one of their labels.

    `by_step` also plays the policies that were kept inside the rounds, `out_of_distribution` also measures what
    training never touched, `lengths` also draws the lengths of responses.
    """

    name: str
    title: str
    question: str
    arms: Callable[[Start], list[Arm]]
    reference: str
    claims: tuple[Claim, ...]
    notes: str = ""
    by_step: bool = False
    out_of_distribution: bool = False
    lengths: bool = False
