"""`oel knowledge`: what a run has learned, how two texts differ, and how to take back what a game taught.

Any process; imports no Ray, torch or vLLM.
"""

from collections import Counter

from oel_ray.errors import UserError
from oel_ray.runs.folder import RunFolder


def listing(folder: RunFolder) -> list[str]:
    """A line for each text: how much is in it, and how much was left out or taken back."""
    lines = []
    for text in folder.knowledge_texts().values():
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
    known = folder.knowledge_texts()
    if missing := {first, second} - {*known}:
        raise UserError(f"{folder.path} holds no knowledge text {min(missing)}: 'oel knowledge RUN_DIR' lists them")
    ours, theirs = ({item.text: item.trajectory_id for item in known[name].items} for name in (first, second))
    gone = [f"- {text}  ({source})" for text, source in ours.items() if text not in theirs]
    return gone + [f"+ {text}  ({source})" for text, source in theirs.items() if text not in ours]
