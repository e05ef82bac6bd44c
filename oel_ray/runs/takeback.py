"""Take back what a run has done: its last rounds, or what it learned of one game. Runs where it is typed."""

from collections.abc import Callable, Sequence
from pathlib import Path

from oel_ray.errors import UserError
from oel_ray.records import KnowledgeText, join_items
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.layout import COLLECT, EXTRACT, IMPORT_KNOWLEDGE, IMPORTS
from oel_ray.runs.stage import Stage


def taught_by(folder: RunFolder, source: str) -> list[KnowledgeText]:
    """The texts with an item from a game.

    Raises:
        UserError: there is none.
    """
    found = [
        text for text in folder.knowledge_texts().values() if source in {item.trajectory_id for item in text.items}
    ]
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
    known = folder.knowledge_texts() | clean
    first, again = min(text.round for text in clean.values()), list[str]()
    for number in [number for number in folder.rounds()[::-1] if number >= first]:
        kept = {*IMPORTS, *((COLLECT, EXTRACT) if number == first else ())}
        again += [f"{name} of round {number}" for name in folder.withdraw(number, kept)]
        for stage in (Stage(folder, number, name) for name in (EXTRACT, IMPORT_KNOWLEDGE)):
            if stage.is_done:
                stage.begin()
                stage.commit_knowledge([text for text in known.values() if text.round == number])
    folder.set_aside(list(folder.strays()))
    return again


def _without(text: KnowledgeText, source: str, count: Callable[[str], int]) -> KnowledgeText:
    items = [item for item in text.items if item.trajectory_id != source]
    rest = join_items([item.text for item in items])
    changes = {"items": items, "text": rest, "tokens": count(rest), "withdrawn": [*text.withdrawn, source]}
    return text.model_copy(update=changes)


def rounds_after(folder: RunFolder, last: int) -> list[int]:
    """List the rounds after one, in order.

    Raises:
        UserError: there is none.
    """
    later = [number for number in folder.rounds() if number > last]
    if not later:
        raise UserError(f"{folder.path} has no round behind round {last}: choose an earlier one with --to-round")
    return later


def roll_back(path: Path, rounds: Sequence[int]) -> None:
    """Move whole rounds into the quarantine, the last one first; works on a damaged run, too."""
    with RunFolder.locked(path) as folder:
        folder.set_aside([folder.files(number).root for number in sorted(rounds, reverse=True)])
