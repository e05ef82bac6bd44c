"""Cut a sequence into runs within a budget. Any process; pure."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def buckets(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Yield runs of items, in order, whose sizes sum to at most `limit`. A larger item is a run of its own."""
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
