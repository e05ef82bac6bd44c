"""`python -m experiments.knowledge_vs_raw`: table 1 of the paper. Run as a script.

Both arms read the same games and practise on the same games. No knowledge is the untouched model, as in the paper.
"""

import sys

from experiments import recipes, runner
from experiments.records import Arm, Claim, Experiment, Start

EXTRACTED, RAW = "extracted", "raw"
ROOM = 2048
"""Tokens that raw games get at least: the micro model's L_max holds many items and not one game."""


def arms(start: Start) -> list[Arm]:
    base = recipes.base(start)
    room = max(ROOM, start.config.extract.max_tokens)
    raw = start.recipe(
        RAW,
        "rounds=1",
        "extract.format=raw",
        f"extract.max_tokens={room}",
        imports=recipes.taken(base, 1, *recipes.GAMES),
    )
    return [recipes.one_round(EXTRACTED, base), recipes.one_round(RAW, raw)]


EXPERIMENT = Experiment(
    name="knowledge_vs_raw",
    title="Extracted knowledge against raw games (table 1)",
    question="Is what the extractor writes worth more than the games themselves?",
    arms=arms,
    reference=EXTRACTED,
    claims=(
        Claim(
            "Raw games in the prompt help.",
            lambda arms: arms[RAW].rate("in_context", 1) - arms[EXTRACTED].rate("policy", 0),
        ),
        Claim(
            "Extracted knowledge in the prompt helps more than raw games.",
            lambda arms: arms[EXTRACTED].rate("in_context", 1) - arms[RAW].rate("in_context", 1),
        ),
        Claim(
            "Consolidated, extracted knowledge is worth more than raw games.",
            lambda arms: arms[EXTRACTED].rate("policy", 1) - arms[RAW].rate("policy", 1),
        ),
        Claim(
            "Consolidated, extracted knowledge is worth more than in the prompt.",
            lambda arms: arms[EXTRACTED].rate("policy", 1) - arms[EXTRACTED].rate("in_context", 1),
        ),
        Claim(
            "Consolidated, raw games are worth less than in the prompt.",
            lambda arms: arms[RAW].rate("in_context", 1) - arms[RAW].rate("policy", 1),
        ),
    ),
    notes=(
        f"Raw games get at least {ROOM} tokens, the newest of them. The micro model has never seen a game in place of "
        "knowledge: that it makes nothing of one is built in."
    ),
)

if __name__ == "__main__":
    sys.exit(runner.main(EXPERIMENT))
