"""`python -m experiments.beyond`: what the paper fixes, changed one at a time. Run as a script."""

import sys

from experiments import recipes, runner
from experiments.records import Arm, Experiment, Start

BASE = "base"
ROUNDS = 2


def arms(start: Start) -> list[Arm]:
    config = start.config
    games, room, texts = config.collect.extraction_games, config.extract.max_tokens, config.extract.seeds
    changes = {
        **{f"K-{count}": f"extract.seeds={count}" for count in (1, 3, 10) if count != texts},
        "n-quarter": f"collect.extraction_games={max(games // 4, 1)}",
        "n-double": f"collect.extraction_games={2 * games}",
        "L_max-quarter": f"extract.max_tokens={room // 4}",
        "L_max-double": f"extract.max_tokens={2 * room}",
        "top-256": "consolidate.divergence=top_k",
        "stale-1": "consolidate.max_staleness=1",
    }
    changed = [
        Arm(label=label, recipe=start.recipe(label, f"rounds={ROUNDS}", change), rounds=ROUNDS)
        for label, change in changes.items()
    ]
    return [Arm(label=BASE, recipe=recipes.base(start), rounds=ROUNDS), *changed]


EXPERIMENT = Experiment(
    name="beyond",
    title="Beyond the paper: K, n, L_max, the divergence, staleness",
    question="Which of the numbers that the paper fixes does the outcome depend on?",
    arms=arms,
    reference=BASE,
    claims=(),
    notes=(
        "The paper claims nothing of these, so there are differences from the base and no verdicts. A teacher that "
        "learns along with the student is no arm: there is no setting for one."
    ),
)

if __name__ == "__main__":
    sys.exit(runner.main(EXPERIMENT))
