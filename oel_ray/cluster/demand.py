"""What a run asks of Ray, and which nodes have room for it. Any process; pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from oel_ray.config.schema import ConsolidateConfig, EnginesConfig, RunConfig

Nodes = Mapping[str, Mapping[str, float]]
"""What Ray says that each node has: `CPU`, `GPU`, `memory` in bytes, resources of the user's own."""
GPU_MEMORY = "GPU memory"
"""Bytes of each GPU of a node, among what it has, where that is known."""
TURNS = ("trainer", "extractors")
"""Pools that are never there at the same time; the others live as long as the run."""


class Demand(NamedTuple):
    """What one pool of a run asks of Ray: so many actors, each of which takes `each` on one node."""

    pool: str
    actors: int
    each: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.pool} {self.actors} x ({amounts(self.each)})"


def engine_takes(config: EnginesConfig, *, on_gpu: bool) -> dict[str, float]:
    """What one engine takes of Ray."""
    usual = {"CPU": 1.0, "GPU": 1.0} if on_gpu else {"CPU": float(config.cpu_threads)}
    scarce = "GPU" if on_gpu else "CPU"
    return usual | {scarce: usual[scarce] * config.tensor_parallel} | config.resources


def rank_takes(config: ConsolidateConfig, *, on_gpu: bool) -> dict[str, float]:
    """What one training rank takes of Ray."""
    return {"CPU": 1.0} | ({"GPU": 1.0} if on_gpu else {}) | config.resources


def demands(config: RunConfig, *, on_gpu: bool) -> list[Demand]:
    """All pools of a run, in the order in which they are started."""
    collect, extract, consolidate = config.collect, config.extract, config.consolidate
    return [
        Demand("engines", config.engines.count, engine_takes(config.engines, on_gpu=on_gpu)),
        Demand("players", collect.players, {"CPU": 1.0} | collect.resources),
        Demand("trainer", consolidate.workers, rank_takes(consolidate, on_gpu=on_gpu)),
        Demand("extractors", min(extract.workers, extract.seeds), {"CPU": 1.0} | extract.resources),
    ]


def total(wanted: Sequence[Demand]) -> dict[str, float]:
    """What a run takes of a whole cluster at most, by the kind of resource."""

    def taken(kind: str, *, in_turns: bool) -> list[float]:
        return [demand.actors * demand.each.get(kind, 0) for demand in wanted if (demand.pool in TURNS) == in_turns]

    kinds = dict.fromkeys(kind for demand in wanted for kind in demand.each)
    return {kind: sum(taken(kind, in_turns=False)) + max(taken(kind, in_turns=True), default=0) for kind in kinds}


def place(wanted: Sequence[Demand], nodes: Nodes) -> tuple[dict[str, Counter[str]], Counter[str]]:
    """Who finds room on which node, and how many of each pool find none.

    A way that works, in the order in which pools are started; like Ray it keeps what needs no GPU away from those that
    have one as long as there is room elsewhere. Ray itself may choose another.
    """
    placed: dict[str, Counter[str]] = {node: Counter() for node in nodes}
    left: Counter[str] = Counter()
    free = {node: dict(there) for node, there in nodes.items()}
    for pool, actors, each in wanted:
        room = {node: dict(there) for node, there in free.items()} if pool in TURNS else free
        for _ in range(actors):
            able = [node for node in room if all(room[node].get(kind, 0) + 1e-6 >= each[kind] for kind in each)]
            if able:
                # The fullest that has room.
                node = min(able, key=lambda node: [nodes[node].get("GPU", 0) > 0, *map(room[node].get, sorted(each))])
                room[node] |= {kind: room[node][kind] - amount for kind, amount in each.items()}
                placed[node][pool] += 1
            else:
                left[pool] += 1
    return placed, left


def placement(wanted: Sequence[Demand], nodes: Nodes) -> str:
    """What is there, and what can run where: nodes that are alike together."""
    shapes = {node: amounts({kind: there.get(kind, 0) for kind in total(wanted)}) for node, there in nodes.items()}
    pools = {
        node: ", ".join(f"{count} {pool}" for pool, count in on.items()) for node, on in place(wanted, nodes)[0].items()
    }
    alike = Counter((shapes[node], pools[node] or "nothing") for node in nodes)
    return "; ".join(f"{count} x ({shape}) for {on}" for (shape, on), count in alike.items()) or "no node"


def amounts(resources: Mapping[str, float]) -> str:
    """`4 CPU + 1 GPU`."""
    return " + ".join(f"{amount:g} {kind}" for kind, amount in resources.items())


def ray_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Ray's options for an actor that takes these resources, and a CPU if they do not say how many."""
    own = {kind: amount for kind, amount in resources.items() if kind not in ("CPU", "GPU")}
    return {"num_cpus": resources.get("CPU", 1), "num_gpus": resources.get("GPU", 0), "resources": own}
