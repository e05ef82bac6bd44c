"""Read experience items from an extractor's answer, and keep them within a token budget. Pure; any process.

An item is the text that it contributes to the knowledge text. A structured item includes its marker. In every format
the knowledge text is `join_items` of its items.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from oel_ray.records import AccumulationStep, KnowledgeItem, KnowledgeText, Rejection, join_items
from oel_ray.text.prompts import ITEM_MARKER

_PATTERNS: dict[Rejection, str] = {
    "control": r"<\|[\w/-]+\|>|<(start|end)_of_turn>|\[/?INST\]|<</?SYS>>|^\W*(system|user|assistant|human) *:",
    "url": r"\b\w+://|\bwww\.\w",
    "code": r"```|<script|#!/|\$\(|\b(sudo|curl|wget|rm) -|\b(eval|exec|system)\(|^\W*(import \w+$|(def|class) \w+\()",
}
_SUSPECT = {reason: re.compile(pattern, re.IGNORECASE | re.MULTILINE) for reason, pattern in _PATTERNS.items()}
"""Patterns of items to reject. Turn markers of all models are among them, because another model may read the text."""


def structured_items(answer: str) -> list[str]:
    """Read the marked statements of an answer, one line each. All else is dropped, continuation lines too."""
    statements = [
        statement.strip()
        for line in answer.splitlines()
        for statement in line.split(ITEM_MARKER)[1:]  # [0] is the text before the first marker
    ]
    return [f"{ITEM_MARKER} {statement}" for statement in statements if statement]


def unstructured_items(answer: str) -> list[str]:
    """Take the whole answer as one item; none if it is blank."""
    return [answer.strip()] if answer.strip() else []


def screen(
    items: Sequence[str], reasons: Sequence[Rejection], control_tokens: Iterable[str]
) -> tuple[list[str], Counter[str]]:
    """Drop items with suspect content. Returns the others, and the number of dropped items by reason.

    This matters because every later prompt shows the knowledge as advice, and training puts it into the weights.
    """

    def against(item: str) -> Iterator[Rejection]:
        said = item.removeprefix(ITEM_MARKER)
        marked = any(token in said for token in control_tokens)
        yield from (reason for reason in reasons if _SUSPECT[reason].search(said) or (reason == "control" and marked))

    verdicts = [next(against(item), None) for item in items]
    kept = [item for item, reason in zip(items, verdicts, strict=True) if reason is None]
    return kept, Counter(filter(None, verdicts))


def admit(
    items: Sequence[str], held: Sequence[str], max_tokens: int, count: Callable[[str], int]
) -> tuple[list[str], Counter[str]]:
    """Select the items that may enter a text. Returns them, and the number of others by reason.

    "over_long" items exceed the budget by themselves, so `fit` would drop all others for them. "repeated" items came
    before, among `items` or in `held`.
    """
    admitted: list[str] = []
    rejected: Counter[str] = Counter()
    for item in items:
        if count(item) > max_tokens:
            rejected["over_long"] += 1
        elif item in admitted or item in held:
            rejected["repeated"] += 1
        else:
            admitted.append(item)
    return admitted, rejected


def fit(items: Sequence[str], max_tokens: int, count: Callable[[str], int]) -> tuple[list[str], int]:
    """Drop the oldest items until the joined text has at most `max_tokens` tokens.

    Returns the kept items and the number of dropped ones.
    """
    dropped = 0
    # Count the joined text, not the sum over items, because line breaks cost tokens and may merge with their
    # neighbours.
    while dropped < len(items) and count(join_items(items[dropped:])) > max_tokens:
        dropped += 1
    return list(items[dropped:]), dropped


def items_after(steps: Iterable[AccumulationStep]) -> list[KnowledgeItem]:
    """Rebuild the items of a knowledge text from the steps of its accumulation, given from the first one on."""
    items: list[KnowledgeItem] = []
    for step in steps:
        items += [KnowledgeItem(text=item, trajectory_id=step.trajectory_id) for item in step.added]
        items = items[step.dropped :]
    return items


def text_after(knowledge: KnowledgeText, steps: int) -> KnowledgeText:
    """Rebuild a knowledge text as it was after the first `steps` trajectories of its accumulation."""
    done = knowledge.steps[:steps]
    items = [item for item in items_after(done) if item.trajectory_id not in knowledge.withdrawn]
    text, tokens = join_items([item.text for item in items]), done[-1].knowledge_tokens if done else 0
    return knowledge.model_copy(update={"text": text, "tokens": tokens, "items": items, "steps": done})


def growth(knowledge: Sequence[KnowledgeText], steps: Iterable[int]) -> list[list[KnowledgeText]]:
    """Rebuild the knowledge texts of a round after each of these steps, in order; the complete texts come last.

    Steps at or beyond the end of the accumulations are left out. Imported texts have no steps.
    """
    end = min((len(text.steps) for text in knowledge), default=0)
    earlier = [step for step in sorted(set(steps)) if step < end]
    return [*([text_after(text, step) for text in knowledge] for step in earlier), list(knowledge)]
