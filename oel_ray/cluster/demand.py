"""Compute the resources that a run needs of Ray, and the nodes that have room for it. Any process; pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from oel_ray.config.schema import ConsolidateConfig, EnginesConfig, RunConfig

Nodes = Mapping[str, Mapping[str, float]]
"""The resources of each node as Ray reports them: `CPU`, `GPU`, `memory` in bytes, custom resources."""
GPU_MEMORY = "GPU memory"
"""The key, among a node's resources, of the bytes of each of its GPUs, if that is known."""
TURNS = ("trainer", "extractors")
"""Pools that never exist at the same time; the others live as long as the run."""


class Demand(NamedTuple):
    """The demand of one pool of a run: its number of actors, each of which reserves `each` on one node."""

    pool: str
    actors: int
    each: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.pool} {self.actors} x ({amounts(self.each)})"


def engine_takes(config: EnginesConfig, *, on_gpu: bool) -> dict[str, float]:
    """Compute the resources that one engine reserves."""
    usual = {"CPU": 1.0, "GPU": 1.0} if on_gpu else {"CPU": float(config.cpu_threads)}
    scarce = "GPU" if on_gpu else "CPU"
    return usual | {scarce: usual[scarce] * config.tensor_parallel} | config.resources


def rank_takes(config: ConsolidateConfig, *, on_gpu: bool) -> dict[str, float]:
    """Compute the resources that one training rank reserves."""
    return {"CPU": 1.0} | ({"GPU": 1.0} if on_gpu else {}) | config.resources


def demands(config: RunConfig, *, on_gpu: bool) -> list[Demand]:
    """List the demands of all pools of a run, in the order in which they are started."""
    collect, extract, consolidate = config.collect, config.extract, config.consolidate
    return [
        Demand("engines", config.engines.count, engine_takes(config.engines, on_gpu=on_gpu)),
        Demand("players", collect.players, {"CPU": 1.0} | collect.resources),
        Demand("trainer", consolidate.workers, rank_takes(consolidate, on_gpu=on_gpu)),
        Demand("extractors", min(extract.workers, extract.seeds), {"CPU": 1.0} | extract.resources),
    ]


def total(wanted: Sequence[Demand]) -> dict[str, float]:
    """Compute the most that a run reserves in the whole cluster, by resource."""

    def taken(kind: str, *, in_turns: bool) -> list[float]:
        return [demand.actors * demand.each.get(kind, 0) for demand in wanted if (demand.pool in TURNS) == in_turns]

    kinds = dict.fromkeys(kind for demand in wanted for kind in demand.each)
    return {kind: sum(taken(kind, in_turns=False)) + max(taken(kind, in_turns=True), default=0) for kind in kinds}


def place(wanted: Sequence[Demand], nodes: Nodes) -> tuple[dict[str, Counter[str]], Counter[str]]:
    """Place the actors on nodes. Returns the pools of each node, and how many actors of each pool find no room.

    Pools are placed in the order in which they are started. Like Ray it places actors without GPUs on nodes without
    GPUs if there is room. Ray itself may choose another placement.
    """
    placed: dict[str, Counter[str]] = {node: Counter() for node in nodes}
    left: Counter[str] = Counter()
    free = {node: dict(there) for node, there in nodes.items()}
    for pool, actors, each in wanted:
        room = {node: dict(there) for node, there in free.items()} if pool in TURNS else free
        for _ in range(actors):
            able = [node for node in room if all(room[node].get(kind, 0) + 1e-6 >= each[kind] for kind in each)]
            if able:
                # The fullest node that has room.
                node = min(able, key=lambda node: [nodes[node].get("GPU", 0) > 0, *map(room[node].get, sorted(each))])
                room[node] |= {kind: room[node][kind] - amount for kind, amount in each.items()}
                placed[node][pool] += 1
            else:
                left[pool] += 1
    return placed, left


def placement(wanted: Sequence[Demand], nodes: Nodes) -> str:
    """Describe the nodes and what can run on each, with equal nodes grouped together."""
    shapes = {node: amounts({kind: there.get(kind, 0) for kind in total(wanted)}) for node, there in nodes.items()}
    pools = {
        node: ", ".join(f"{count} {pool}" for pool, count in on.items()) for node, on in place(wanted, nodes)[0].items()
    }
    alike = Counter((shapes[node], pools[node] or "nothing") for node in nodes)
    return "; ".join(f"{count} x ({shape}) for {on}" for (shape, on), count in alike.items()) or "no node"


def amounts(resources: Mapping[str, float]) -> str:
    """Format resources, as in `4 CPU + 1 GPU`."""
    return " + ".join(f"{amount:g} {kind}" for kind, amount in resources.items())


def ray_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Build Ray's options for an actor that reserves these resources, and one CPU if they name no number of CPUs."""
    own = {kind: amount for kind, amount in resources.items() if kind not in ("CPU", "GPU")}
    return {"num_cpus": resources.get("CPU", 1), "num_gpus": resources.get("GPU", 0), "resources": own}
