"""`python -m experiments.rounds`: figures 4 and 5 of the paper, round after round. Run as a script."""

import sys
from functools import partial

from experiments import recipes, runner
from experiments.records import Arm, Arms, Claim, Condition, Experiment, Start

OEL = "oel"
ROUNDS = (1, 2, 3)


def arms(start: Start) -> list[Arm]:
    return [Arm(label=OEL, recipe=recipes.base(start), rounds=len(ROUNDS))]


def _above(condition: Condition, number: int, arms: Arms) -> float:
    """How far a policy is above the one that its round began with."""
    return arms[OEL].rate(condition, number) - arms[OEL].rate("policy", number - 1)


def _above_context(number: int, arms: Arms) -> float:
    return arms[OEL].rate("policy", number) - arms[OEL].rate("in_context", number)


def _grows_less_in_its_second_half(arms: Arms) -> float:
    it = arms[OEL]
    middle = it.rate("in_context", 1, it.steps("in_context", 1)[-1])
    return (middle - it.rate("policy", 0)) - (it.rate("in_context", 1) - middle)


EXPERIMENT = Experiment(
    name="rounds",
    title="Rounds: accumulate, consolidate, again (figures 4 and 5)",
    question="Does a policy get better round after round, by knowledge in its prompt first and in its weights then?",
    arms=arms,
    reference=OEL,
    claims=(
        *(
            Claim(
                f"Knowledge in the prompt raises the pass rate (round {number}).", partial(_above, "in_context", number)
            )
            for number in ROUNDS
        ),
        Claim(
            "Accumulation saturates: its second half adds less than its first (round 1).",
            _grows_less_in_its_second_half,
        ),
        *(
            Claim(
                "After consolidation the bare policy is better than it was with the knowledge in its prompt "
                f"(round {number}).",
                partial(_above_context, number),
            )
            for number in ROUNDS
        ),
        *(
            Claim(f"Round {number} leaves a better policy than it began with.", partial(_above, "policy", number))
            for number in ROUNDS
        ),
        Claim(
            "Responses get shorter over the rounds.",
            lambda arms: arms[OEL].tokens("policy", 0) - arms[OEL].tokens("policy", 3),
            in_tokens=True,
        ),
        Claim(
            "They get shorter during accumulation already (round 1).",
            lambda arms: arms[OEL].tokens("policy", 0) - arms[OEL].tokens("in_context", 1),
            in_tokens=True,
        ),
    ),
    notes="What the micro model learned from is longer where it is told nothing: that it gets shorter is built in.",
    lengths=True,
)

if __name__ == "__main__":
    sys.exit(runner.main(EXPERIMENT))
