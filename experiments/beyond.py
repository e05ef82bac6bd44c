"""`python -m experiments.beyond`: what the paper fixes, changed one at a time. Run as a script.

An arm takes of the base's round 1 what its change does not touch: the games, or the games and the texts. Other n are
other games, and play for themselves.
"""

import sys

from experiments import recipes, runner
from experiments.records import Arm, Experiment, Imported, Start

BASE = "base"
ROUNDS = 2


def arms(start: Start) -> list[Arm]:
    config, base = start.config, recipes.base(start)
    games, room, texts = config.collect.extraction_games, config.extract.max_tokens, config.extract.seeds

    def changed(label: str, change: str, *shared: Imported) -> Arm:
        recipe = start.recipe(label, f"rounds={ROUNDS}", change, imports=recipes.taken(base, 1, *shared))
        return Arm(label=label, recipe=recipe, rounds=ROUNDS)

    return [
        Arm(label=BASE, recipe=base, rounds=ROUNDS),
        *(changed(f"K-{count}", f"extract.seeds={count}", *recipes.GAMES) for count in (1, 3, 10) if count != texts),
        changed("n-quarter", f"collect.extraction_games={max(games // 4, 1)}"),
        changed("n-double", f"collect.extraction_games={2 * games}"),
        changed("L_max-quarter", f"extract.max_tokens={room // 4}", *recipes.GAMES),
        changed("L_max-double", f"extract.max_tokens={2 * room}", *recipes.GAMES),
        changed("top-256", "consolidate.divergence=top_k", *recipes.TEXTS),
        changed("stale-1", "consolidate.max_staleness=1", *recipes.TEXTS),
        changed("live-teacher", "consolidate.live_teacher=true", *recipes.TEXTS),
    ]


EXPERIMENT = Experiment(
    name="beyond",
    title="Beyond the paper: K, n, L_max, the divergence, staleness, the teacher",
    question="Which of the choices that the paper makes does the outcome depend on?",
    arms=arms,
    reference=BASE,
    claims=(),
    notes="The paper claims nothing of these: each choice is held against the base alone.",
)

if __name__ == "__main__":
    sys.exit(runner.main(EXPERIMENT))
