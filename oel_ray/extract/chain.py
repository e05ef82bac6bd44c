"""Run one accumulation, which reads the trajectories one after the other and grows one knowledge text.

Runs as a coroutine in an extraction worker; many share its event loop. Imports no Ray.
"""

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from oel_ray.config.schema import ExtractConfig, RunConfig
from oel_ray.extract.items import admit, fit, items_after, screen, structured_items, unstructured_items
from oel_ray.ids import knowledge_id
from oel_ray.records import AccumulationStep, Experience, Generate, Generation, KnowledgeItem, KnowledgeText, join_items
from oel_ray.seeds import derive_seed
from oel_ray.text import prompts
from oel_ray.text.chat import ChatFormat, strip_thinking


def reading_order(
    trajectories: Sequence[Experience], run_seed: int, round_number: int, seed_index: int
) -> list[Experience]:
    """Choose the order in which an accumulation reads T: as collected for the first one, shuffled for the others."""
    order = list(trajectories)
    if seed_index > 0:
        random.Random(derive_seed(run_seed, "reading_order", round_number, seed_index)).shuffle(order)
    return order


def extraction_prompt(game: str, previous: str, config: ExtractConfig) -> str:
    """Write the extractor's prompt about a game (a `prompts.transcript`), with the knowledge accumulated so far."""
    structured = config.format == "structured"
    return prompts.extraction_prompt(game, previous, structured=structured, show_previous=config.show_previous)


def extraction_prompt_ids(
    trajectory: Experience, previous: str, config: ExtractConfig, chat: ChatFormat, max_model_len: int
) -> list[int] | None:
    """Tokenise the extractor's prompt so that its response fits in the context. None if not even the last turn fits.

    The fewest oldest turns that suffice are left out. The end of the game, the knowledge and the question stay whole.
    """

    def render(skipped: int) -> list[int]:
        game = prompts.transcript(trajectory.instructions, trajectory.turns, trajectory.outcome, skipped)
        return chat.message_ids(extraction_prompt(game, previous, config))

    room = max_model_len - config.sampling.max_tokens
    whole = render(0)
    if len(whole) <= room:
        return whole
    choices = range(1, len(trajectory.turns))
    found = bisect_left(choices, True, key=lambda skipped: len(render(skipped)) <= room)
    return render(choices[found]) if found < len(choices) else None


async def accumulate(
    trajectories: Sequence[Experience],
    seed_index: int,
    round_number: int,
    config: RunConfig,
    chat: ChatFormat,
    generate: Generate,
    *,
    known: Sequence[AccumulationStep] = (),
    on_step: Callable[[AccumulationStep], None] | None = None,
) -> KnowledgeText:
    """Accumulate one knowledge text from an empty one: a step per trajectory, no selection.

    Resumes after the first steps if those are `known`.

    Raises:
        EngineUnavailable: `generate` found no engine.
    """
    extract, identity = config.extract, knowledge_id(round_number, seed_index)
    steps, room = list(known), config.engines.max_model_len
    items = items_after(steps)
    text = join_items([item.text for item in items])

    order = reading_order(trajectories, config.seed, round_number, seed_index)
    for index, trajectory in enumerate(order[len(steps) :], start=len(steps)):
        response: Generation | None = None
        found: list[str] = []
        status: Literal["added", "unclosed_thought", "no_items", "over_long", "repeated", "rejected"] = "no_items"
        blank = 0
        if extract.format == "raw":
            found = [prompts.transcript(trajectory.instructions, trajectory.turns, trajectory.outcome)]
        elif (prompt_ids := extraction_prompt_ids(trajectory, text, extract, chat, room)) is None:
            status = "over_long"
        else:
            seed = derive_seed(config.seed, "extract", round_number, seed_index, index)
            response = await generate(prompt_ids, extract.sampling.sampling(), seed=seed, key=identity)
            answer = strip_thinking(response.text, thinking=chat.thinking)
            if answer is None:
                status = "unclosed_thought"
            elif extract.format == "structured":
                found = structured_items(answer)
                blank = answer.count(prompts.ITEM_MARKER) - len(found)
            else:
                found = unstructured_items(answer)

        held = [] if extract.keep_repeats else [item.text for item in items]
        found, suspect = screen(found, () if extract.format == "raw" else extract.reject, chat.control_tokens)
        added, refused = admit(found, held, extract.max_tokens, chat.count)
        if added:
            status = "added"
        elif refused:
            status = "over_long" if refused["over_long"] else "repeated"
        elif suspect:
            status = "rejected"
        items += [KnowledgeItem(text=item, trajectory_id=trajectory.id) for item in added]
        kept, dropped = fit([item.text for item in items], extract.max_tokens, chat.count)
        items = items[dropped:]
        text = join_items(kept)
        steps.append(
            AccumulationStep(
                index=index,
                trajectory_id=trajectory.id,
                status=status,
                added=added,
                rejected=dict(suspect + refused + Counter(empty=blank)),
                dropped=dropped,
                knowledge_tokens=chat.count(text),
                response_tokens=len(response.token_ids) if response else 0,
                weight_version=response.weight_version if response else "",
            )
        )
        if on_step:
            on_step(steps[-1])

    return KnowledgeText(
        id=identity,
        round=round_number,
        seed=seed_index,
        format=extract.format,
        text=text,
        tokens=chat.count(text),
        items=items,
        steps=steps,
    )
