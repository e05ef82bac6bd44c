"""`oel knowledge`: what a run has learned, how two texts differ, and how to take back what a game taught.

Any process; imports no Ray, torch or vLLM.
"""

from collections import Counter
from collections.abc import Callable

from oel_ray.errors import UserError
from oel_ray.extract.items import join
from oel_ray.layout import COLLECT, EXTRACT, IMPORT_KNOWLEDGE, IMPORTS
from oel_ray.records import KnowledgeText
from oel_ray.runs import RunFolder


def texts(folder: RunFolder) -> dict[str, KnowledgeText]:
    """The knowledge texts of all rounds, by id."""
    return {text.id: text for number in folder.rounds() for text in folder.files(number).knowledge_texts()}


def listing(folder: RunFolder) -> list[str]:
    """A line for each text: how much is in it, and how much was left out or taken back."""
    lines = []
    for text in texts(folder).values():
        sources = {item.trajectory_id for item in text.items}
        rejected = Counter(reason for step in text.steps for reason, n in step.rejected.items() for _ in range(n))
        parts = [f"{text.id}: {len(text.items)} items of {len(sources)} games, {text.tokens} tokens"]
        parts += [f"{count} rejected for {reason}" for reason, count in sorted(rejected.items())]
        lines.append(", ".join(parts + [f"nothing of {source}" for source in text.withdrawn]))
    return lines


def difference(folder: RunFolder, first: str, second: str) -> list[str]:
    """The items that only one of two texts has, each with the game that it came from.

    Raises:
        UserError: there is no such text.
    """
    known = texts(folder)
    if missing := {first, second} - {*known}:
        raise UserError(f"{folder.path} holds no knowledge text {min(missing)}: 'oel knowledge RUN_DIR' lists them")
    ours, theirs = ({item.text: item.trajectory_id for item in known[name].items} for name in (first, second))
    gone = [f"- {text}  ({source})" for text, source in ours.items() if text not in theirs]
    return gone + [f"+ {text}  ({source})" for text, source in theirs.items() if text not in ours]


def taught_by(folder: RunFolder, source: str) -> list[KnowledgeText]:
    """The texts with an item from a game.

    Raises:
        UserError: there is none.
    """
    found = [text for text in texts(folder).values() if source in {item.trajectory_id for item in text.items}]
    if not found:
        raise UserError(f"nothing in {folder.path} was learned from '{source}': 'oel show' names the game of each item")
    return found


def drop(folder: RunFolder, source: str, count: Callable[[str], int]) -> list[str]:
    """Take what a game taught out of the knowledge, and set aside all that was made with it.

    What later steps of an accumulation wrote with it in view stays. `count` gives the tokens of a text. Returns the
    stages that are to be done again.

    Raises:
        UserError: no item came from that game.
    """
    clean = {text.id: _without(text, source, count) for text in taught_by(folder, source)}
    known = texts(folder) | clean
    first, again = min(text.round for text in clean.values()), list[str]()
    for number in [number for number in folder.rounds()[::-1] if number >= first]:
        kept = {*IMPORTS, *((COLLECT, EXTRACT) if number == first else ())}
        again += [f"{name} of round {number}" for name in folder.withdraw(number, kept)]
        for stage in (folder.stage(number, name) for name in (EXTRACT, IMPORT_KNOWLEDGE)):
            if stage.is_done:
                stage.begin()
                stage.commit_knowledge([text for text in known.values() if text.round == number])
    folder.set_aside(list(folder.strays()))
    return again


def _without(text: KnowledgeText, source: str, count: Callable[[str], int]) -> KnowledgeText:
    items = [item for item in text.items if item.trajectory_id != source]
    rest = join([item.text for item in items])
    changes = {"items": items, "text": rest, "tokens": count(rest), "withdrawn": [*text.withdrawn, source]}
    return text.model_copy(update=changes)
