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

    `starts` counts the actors that stood here, `replacement` is the task that puts the next one here, and `why_dead`
    says what the last one died of that could not be replaced.
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
    """Which replica serves a key: the one that served it last, unless it is much busier than the least busy one."""

    replicas: list[Replica]
    _home: MutableMapping[str, int] = field(default_factory=lambda: LRUCache(REMEMBERED))

    def pick(self, key: str, tokens: int) -> Replica:
        """The replica for a request of `tokens` tokens; counts them as its load.

        Raises:
            EngineUnavailable: no healthy replica is left; says what the last ones died of.
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
        """One of the `healthy` ones. `home` served the key last; None for a new key or a dead replica."""
        idlest = min(healthy, key=lambda replica: replica.load)
        # A prefix hit is worth a wait, but not any wait: beyond twice the least load the request moves.
        return home if home and home.load <= 2 * idlest.load + tokens else idlest
