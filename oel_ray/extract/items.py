"""Experience items: read from an extractor's answer, kept within a token budget. Pure; any process.

An item is the text that it contributes to the knowledge text; a structured item carries its marker. The knowledge
text is always `join` of its items, for every format.
"""

from collections.abc import Callable, Iterable, Sequence

from oel_ray.prompts import ITEM_MARKER
from oel_ray.records import AccumulationStep, KnowledgeItem, KnowledgeText


def structured_items(answer: str) -> list[str]:
    """The marked statements of an answer, one line each. Everything else is dropped, continuation lines too."""
    statements = [
        statement.strip()
        for line in answer.splitlines()
        for statement in line.split(ITEM_MARKER)[1:]  # [0] is what stands before the first marker
    ]
    return [f"{ITEM_MARKER} {statement}" for statement in statements if statement]


def unstructured_items(answer: str) -> list[str]:
    """The whole answer as one item; none if it is blank."""
    return [answer.strip()] if answer.strip() else []


def join(items: Sequence[str]) -> str:
    return "\n".join(items)


def within(items: Sequence[str], max_tokens: int, count: Callable[[str], int]) -> list[str]:
    """The items that fit the budget by themselves. The others must not enter: `fit` would drop all else for them."""
    return [item for item in items if count(item) <= max_tokens]


def fit(items: Sequence[str], max_tokens: int, count: Callable[[str], int]) -> tuple[list[str], int]:
    """Drop the oldest items until the joined text has at most `max_tokens` tokens: what is kept, how many went."""
    dropped = 0
    # The joined text is counted, not the sum over items: line breaks cost tokens and may merge with what they touch.
    while dropped < len(items) and count(join(items[dropped:])) > max_tokens:
        dropped += 1
    return list(items[dropped:]), dropped


def items_after(steps: Iterable[AccumulationStep]) -> list[KnowledgeItem]:
    """The items that are in a knowledge text after these steps of its accumulation, the first one included."""
    items: list[KnowledgeItem] = []
    for step in steps:
        items += [KnowledgeItem(text=item, trajectory_id=step.trajectory_id) for item in step.added]
        items = items[step.dropped :]
    return items


def text_after(knowledge: KnowledgeText, steps: int) -> KnowledgeText:
    """A knowledge text as it was after the first `steps` trajectories that its accumulation read."""
    done = knowledge.steps[:steps]
    items = items_after(done)
    text, tokens = join([item.text for item in items]), done[-1].knowledge_tokens if done else 0
    return knowledge.model_copy(update={"text": text, "tokens": tokens, "items": items, "steps": done})


def growth(knowledge: Sequence[KnowledgeText], steps: Iterable[int]) -> list[list[KnowledgeText]]:
    """The knowledge texts of a round after each of these steps, in order, and at last as they are.

    Steps that the accumulations did not go beyond are left out: texts from elsewhere have none.
    """
    end = min((len(text.steps) for text in knowledge), default=0)
    earlier = [step for step in sorted(set(steps)) if step < end]
    return [*([text_after(text, step) for text in knowledge] for step in earlier), list(knowledge)]
