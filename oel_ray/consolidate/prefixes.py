"""List the prefixes, the places in played games where the student responds again, and plan each step's. Pure.

The driver plans with it.
"""

import random
from collections.abc import Sequence
from itertools import chain, groupby, pairwise
from typing import NamedTuple

from oel_ray.config.schema import ConsolidateConfig
from oel_ray.errors import RunFailed, UserError
from oel_ray.ids import prefix_id
from oel_ray.records import Experience, Prefix
from oel_ray.seeds import derive_seed
from oel_ray.text import prompts
from oel_ray.text.chat import ChatFormat


class Draw(NamedTuple):
    """One sample of a step, as indices into the prefixes and into the K knowledge texts."""

    prefix: int
    knowledge: int


Plan = list[list[Draw]]
"""The draws of every optimizer step of a round."""


def prefixes(experiences: Sequence[Experience], chat: ChatFormat) -> list[Prefix]:
    """Make a prefix of every turn of every trajectory, in order. `id` is "trajectory id/index of the turn", from 0.

    Recorded prompt ids must equal those that the text gives today. If they differ, tokenizer, chat template or wording
    changed since the game was played. Student and teacher would then read different games. Imported trajectories come
    without ids and get them here.

    Raises:
        RunFailed: recorded ids differ.
    """
    result = []
    for experience in experiences:
        for number, turn in enumerate(experience.turns):
            before = experience.turns[:number]
            situation = prompts.game_situation(experience.instructions, before, turn.observation, experience.template)
            prompt_ids = chat.game_ids(situation)
            if turn.prompt_ids and turn.prompt_ids != prompt_ids:
                raise RunFailed(
                    f"trajectory {experience.id}, turn {number}: the recorded prompt ids are not those of its text "
                    f"(played with template {experience.template}, now {prompts.GAME_TEMPLATE}; same tokenizer?)"
                )
            identity = prefix_id(experience.id, number)
            result.append(Prefix(id=identity, trajectory_id=experience.id, turn=number, prompt_ids=prompt_ids))
    return result


def step_batches(
    prefixes: Sequence[Prefix],
    knowledge_count: int,
    config: ConsolidateConfig,
    *,
    run_seed: int,
    round_number: int,
) -> Plan:
    """Plan the prefixes of each step, and the knowledge text that the teacher reads with each prefix.

    "shuffled" cuts a permutation of all prefixes into near-equal parts. "by_game" gives a step the prefixes of its own
    `config.games_per_step` games, in order. A prefix is used at most once, with "shuffled" exactly once. Knowledge is
    drawn per prefix id, so a prefix keeps its text whatever the batching.

    Raises:
        UserError: some step would have no prefix.
    """
    steps = config.steps
    if config.batching == "shuffled":
        order = list(range(len(prefixes)))
        random.Random(derive_seed(run_seed, "prefix_order", round_number)).shuffle(order)
        cuts = [len(order) * step // steps for step in range(steps + 1)]
        parts = [order[start:end] for start, end in pairwise(cuts)]
    else:
        games = [[*game] for _, game in groupby(range(len(prefixes)), lambda index: prefixes[index].trajectory_id)]
        each = config.games_per_step
        parts = [[*chain.from_iterable(games[step * each : (step + 1) * each])] for step in range(steps)]
    if not all(parts):
        raise UserError(
            f"{len(prefixes)} prefixes do not fill {steps} steps: lower consolidate.steps, or bring more games"
        )
    seeds = [derive_seed(run_seed, "knowledge", round_number, prefix.id) for prefix in prefixes]
    return [[Draw(index, seeds[index] % knowledge_count) for index in part] for part in parts]
