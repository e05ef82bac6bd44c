"""`python -m experiments.model_size`: figure 7 of the paper, two rounds at three sizes. Run as a script.

The micro model's other two sizes have to be trained first; README.md has the commands.
"""

import sys
from functools import partial

from experiments import recipes, runner
from experiments.records import Arm, Arms, Claim, Experiment, Recipe, Start
from oel_ray.errors import UserError
from oel_ray.models.resolve import MICRO

SMALL, BASE, LARGE = "small", "base", "large"
MODELS = {SMALL: "./build/micro-small", LARGE: "./build/micro-large"}
PRESETS = {SMALL: "frozenlake-qwen3-1.7b", BASE: "frozenlake-qwen3-4b", LARGE: "frozenlake-qwen3-8b"}
SIZES = (SMALL, BASE, LARGE)
NEAR = 0.05


def of_size(start: Start, size: str) -> Recipe:
    """Two rounds of a model of another size than the preset's: trained by us, or the paper's with its preset."""
    if start.config.model == MICRO:
        return start.recipe(f"size-{size}", "rounds=2", f"model={MODELS[size]}")
    return start._replace(preset=PRESETS[size]).recipe(f"size-{size}", "rounds=2")


def arms(start: Start) -> list[Arm]:
    own = own_size(start)
    recipe_of = {size: recipes.base(start) if size == own else of_size(start, size) for size in SIZES}
    return [Arm(label=size, recipe=recipe, rounds=2) for size, recipe in recipe_of.items()]


def own_size(start: Start) -> str:
    """The size of the preset's own model.

    Raises:
        UserError: the preset's model is none of three.
    """
    if start.config.model == MICRO:
        return BASE
    for size, preset in PRESETS.items():
        if preset == start.preset:
            return size
    raise UserError(
        f"no other sizes of {start.preset}'s model are known: "
        f"take experiments/micro.yaml, {', '.join(PRESETS.values())}"
    )


def _gain(size: str, number: int, arms: Arms) -> float:
    return arms[size].rate("policy", number) - arms[size].rate("policy", number - 1)


EXPERIMENT = Experiment(
    name="model_size",
    title="Three sizes, two rounds (figure 7)",
    question="Do models of every size learn, and do larger ones end higher?",
    arms=arms,
    reference=BASE,
    claims=(
        *(
            Claim(f"The {size} model is better after round {number} than before it.", partial(_gain, size, number))
            for size in SIZES
            for number in (1, 2)
        ),
        Claim(
            f"Before learning, the largest is within {100 * NEAR:.0f} points of the smallest.",
            lambda arms: arms[LARGE].rate("policy", 0) - arms[SMALL].rate("policy", 0),
            within=NEAR,
        ),
        Claim(
            "After round 2 the largest is better than the smallest.",
            lambda arms: arms[LARGE].rate("policy", 2) - arms[SMALL].rate("policy", 2),
        ),
        Claim(
            f"Round 2 brings the largest as much as the smallest, within {100 * NEAR:.0f} points.",
            lambda arms: _gain(LARGE, 2, arms) - _gain(SMALL, 2, arms),
            within=NEAR,
        ),
    ),
)

if __name__ == "__main__":
    sys.exit(runner.main(EXPERIMENT))
