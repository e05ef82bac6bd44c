"""`python -m experiments.on_vs_off_policy`: figure 6 of the paper, step by step. Run as a script.

The off-policy arm takes games and knowledge of round 1 from the other: the two differ in how they are consolidated. In
round 2 each plays for itself.
"""

import sys

from experiments import recipes, runner
from experiments.records import Arm, Arms, Claim, Experiment, Start

ON, OFF = "on_policy", "off_policy"
NEAR = 0.05


def arms(start: Start) -> list[Arm]:
    on = recipes.base(start)
    off = start.recipe(
        OFF,
        "rounds=2",
        f"consolidate.keep_steps={list(on.config.consolidate.keep_steps)}",
        "consolidate.responses=teacher",
        "consolidate.divergence=forward",
        "evaluate.in_context=false",
        imports=recipes.taken(on, 1, *recipes.TEXTS),
    )
    return [Arm(label=ON, recipe=on, rounds=2), Arm(label=OFF, recipe=off, rounds=2)]


def _higher_at(number: int, arms: Arms) -> float:
    return arms[ON].rate("policy", number) - arms[OFF].rate("policy", number)


def _higher_throughout(arms: Arms) -> float:
    """Mean over all that was measured behind the start."""
    places = [(number, step) for number in (1, 2) for step in (*arms[ON].steps("policy", number), None)]
    return sum(arms[ON].rate("policy", *at) - arms[OFF].rate("policy", *at) for at in places) / len(places)


def _drift(label: str, arms: Arms) -> float:
    return arms[label].rate("out_of_distribution", 2) - arms[label].rate("out_of_distribution", 0)


EXPERIMENT = Experiment(
    name="on_vs_off_policy",
    title="On-policy against off-policy context distillation (figure 6)",
    question="Does it matter that the student writes the responses itself, for what is trained and for what is not?",
    arms=arms,
    reference=ON,
    claims=(
        Claim("On-policy ends higher in distribution after round 1.", lambda arms: _higher_at(1, arms)),
        Claim("On-policy ends higher in distribution after round 2.", lambda arms: _higher_at(2, arms)),
        Claim("On-policy is higher in distribution, on average over all steps.", _higher_throughout),
        Claim(
            f"On-policy stays within {100 * NEAR:.0f} points of where it was out of distribution, after two rounds.",
            lambda arms: _drift(ON, arms),
            within=NEAR,
        ),
        Claim("Off-policy gets worse out of distribution.", lambda arms: -_drift(OFF, arms)),
        Claim(
            "On-policy ends higher out of distribution.",
            lambda arms: arms[ON].rate("out_of_distribution", 2) - arms[OFF].rate("out_of_distribution", 2),
        ),
    ),
    notes=(
        "Out of distribution is for the micro model the same game on boards with other letters, in pairs that no "
        "training used, which the prompt explains; for other models IF-Eval, prompt-level strict accuracy."
    ),
    by_step=True,
    out_of_distribution=True,
)

if __name__ == "__main__":
    sys.exit(runner.main(EXPERIMENT))
