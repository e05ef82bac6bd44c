"""A sequence cut into runs within a budget. Any process; pure."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def buckets(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Runs of items, in order, that have at most `limit` together; one that has more is alone in its run."""
    run: list[Item] = []
    filled = 0
    for item in items:
        if run and filled + size(item) > limit:
            yield run
            run, filled = [], 0
        run.append(item)
        filled += size(item)
    if run:
        yield run
