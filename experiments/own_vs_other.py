"""`python -m experiments.own_vs_other`: table 2 of the paper. Run as a script.

The same policy practises on the same games with knowledge from three authors: itself, a larger model, and itself as it
is after two rounds, when it wins more. Both others have read games of their own.
"""

import sys

from experiments import model_size, recipes, runner
from experiments.records import Arm, Claim, Experiment, Recipe, Start
from oel_ray.errors import UserError

OWN, LARGER, LATER = "own", "larger", "later"


def arms(start: Start) -> list[Arm]:
    base = recipes.base(start)
    *smaller, largest = model_size.SIZES
    own = model_size.own_size(start)
    if own == largest:
        raise UserError(f"no model larger than that of {start.preset} is known: take a preset of a smaller one")
    larger = model_size.of_size(start, model_size.SIZES[smaller.index(own) + 1])

    def by(author: str, source: Recipe, number: int) -> Arm:
        # Texts of a model with another tokenizer may be longer in this one's tokens.
        room = 2 * max(start.config.extract.max_tokens, source.config.extract.max_tokens)
        imports = (*recipes.taken(base, 1, "consolidation"), *recipes.taken(source, number, "knowledge"))
        recipe = start.recipe(f"by-{author}", "rounds=1", f"extract.max_tokens={room}", imports=imports)
        return recipes.one_round(author, recipe)

    return [recipes.one_round(OWN, base), by(LARGER, larger, 1), by(LATER, base, 3)]


EXPERIMENT = Experiment(
    name="own_vs_other",
    title="Own knowledge against that of a stronger model (table 2)",
    question="Is what a policy has found out itself worth more to it than what a stronger one has?",
    arms=arms,
    reference=OWN,
    claims=(
        Claim(
            "A larger model's knowledge in the prompt helps.",
            lambda arms: arms[LARGER].rate("in_context", 1) - arms[OWN].rate("policy", 0),
        ),
        Claim(
            "Own knowledge in the prompt helps more than a larger model's.",
            lambda arms: arms[OWN].rate("in_context", 1) - arms[LARGER].rate("in_context", 1),
        ),
        Claim(
            "Consolidated, own knowledge is worth more than a larger model's.",
            lambda arms: arms[OWN].rate("policy", 1) - arms[LARGER].rate("policy", 1),
        ),
        Claim(
            "Consolidated, own knowledge is worth more than that of the same model two rounds later.",
            lambda arms: arms[OWN].rate("policy", 1) - arms[LATER].rate("policy", 1),
        ),
    ),
)

if __name__ == "__main__":
    sys.exit(runner.main(EXPERIMENT))
