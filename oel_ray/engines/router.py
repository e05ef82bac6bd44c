"""Which engine answers a request. Pure; the pool's control actor holds it."""

import asyncio
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachetools import LRUCache

from oel_ray.errors import EngineUnavailable

REMEMBERED = 100_000
"""Keys whose home is known; the one that was asked for longest ago is forgotten first."""


@dataclass
class Replica:
    """One engine as the pool sees it. `load` counts the tokens of its requests in flight, prompts and responses.

    `starts` counts the actors started for this replica. `replacement` is the task that starts the next one. `why_dead`
    is the cause of death of the last one, if it could not be replaced.
    """

    index: int
    handle: Any
    load: int = 0
    healthy: bool = True
    starts: int = 1
    replacement: asyncio.Task[None] | None = None
    why_dead: str = ""


@dataclass
class Router:
    """Route each key to the replica that served it last, unless that is much busier than the least busy one."""

    replicas: list[Replica]
    _home: MutableMapping[str, int] = field(default_factory=lambda: LRUCache(REMEMBERED))

    def pick(self, key: str, tokens: int) -> Replica:
        """Choose the replica for a request of `tokens` tokens, and add them to its load.

        Raises:
            EngineUnavailable: no healthy replica is left; names the causes of death.
        """
        healthy = [replica for replica in self.replicas if replica.healthy]
        if not healthy:
            reasons = "; ".join(filter(None, (replica.why_dead for replica in self.replicas)))
            raise EngineUnavailable("no healthy engine is left" + (f" ({reasons})" if reasons else ""))
        home = self.replicas[self._home[key]] if key in self._home else None
        chosen = self.choose(healthy, home if home and home.healthy else None, tokens)
        self._home[key] = chosen.index
        chosen.load += tokens
        return chosen

    def choose(self, healthy: Sequence[Replica], home: Replica | None, tokens: int) -> Replica:
        """Choose one of the `healthy` replicas. `home` served the key last; None for a new key or a dead replica."""
        idlest = min(healthy, key=lambda replica: replica.load)
        # A prefix hit is worth some waiting. Beyond twice the least load the request moves.
        return home if home and home.load <= 2 * idlest.load + tokens else idlest
