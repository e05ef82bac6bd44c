"""What a configuration asks for, worked out from the configuration alone. Any process; pure.

`oel config` prints it below the configuration, `oel run` says the most of it before it starts, and `oel_ray.preflight`
adds the length of real prompts to it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from oel_ray.config.budget import Reading, readings
from oel_ray.config.precision import Auto, precisions
from oel_ray.config.schema import ConsolidateConfig, EnginesConfig, RunConfig
from oel_ray.consolidate.memory import ModelSize, _bytes, rank_memory
from oel_ray.formats import gib
from oel_ray.runs.schedule import planned_stages

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


def outlook(config: RunConfig, size: ModelSize, nodes: Nodes, *, on_gpu: bool) -> list[str]:
    """What can run where, and what of the memory there engines and ranks keep, beside what comes and goes."""
    engines, consolidate = config.engines, config.consolidate
    of, kind = ("GPU", GPU_MEMORY) if on_gpu else ("CPU", "memory")
    there = min((node[kind] for node in nodes.values() if node.get(of) and node.get(kind)), default=0)
    one, room = ("GPU" if on_gpu else "process"), (f" ({gib(there)})" if there else "")
    weights, token = (
        n * _bytes(engines.dtype) / engines.tensor_parallel for n in (size.parameters, size.values_per_token)
    )
    cache = there * engines.gpu_memory_utilization - weights if on_gpu else engines.cpu_kv_cache_gib * 2**30
    rank = rank_memory(consolidate, size.own, size.trained, consolidate.workers) | {
        "teacher": size.teacher * _bytes(consolidate.precision),
        "its kept texts at most": consolidate.teacher_cache_gib * 2**30,
    }
    lying = sum(count for name, count in rank.items() if "host" not in name)
    cached = f"caches {gib(cache)} for {cache / token:,.0f} tokens" if there or not on_gpu else "caches in what is left"
    few = ": too little, raise engines.tensor_parallel" * (cache <= 0 < there)
    tight = ": tight, lower consolidate.teacher_cache_gib, or raise zero_stage or workers" * (lying > 0.85 * there > 0)
    parts = ", ".join(f"{name} {gib(count)}" for name, count in rank.items())
    return [
        f"nodes: {placement(demands(config, on_gpu=on_gpu), nodes)}",
        f"an engine's {one}{room}: weights {gib(weights)}, {cached}{few}",
        f"a training rank's {one}{room}: {parts}, {gib(lying)} in all{tight}",
    ]


class Sizes(NamedTuple):
    """How much a run does. Samples are at most: games may end early."""

    stages: int
    games: int
    extractions: int
    samples: int
    policy_games: int
    in_context_games: int

    @classmethod
    def of(cls, config: RunConfig) -> "Sizes":
        """All but `stages` count for one round."""
        evaluate, games = config.evaluate, config.collect.extraction_games
        policy_games = evaluate.maps * evaluate.seeds if evaluate.enabled else 0
        return cls(
            stages=sum(len(planned_stages(config, number)) for number in range(config.rounds + 1)),
            games=sum(config.training_games.values()),
            extractions=0 if config.extract.format == "raw" else config.extract.seeds * games,
            samples=config.consolidate.games * config.env.max_turns,
            policy_games=policy_games,
            in_context_games=policy_games * len({*evaluate.accumulation_steps, games}) if evaluate.in_context else 0,
        )


def headline(config: RunConfig) -> str:
    sizes = Sizes.of(config)
    return (
        f"{sizes.stages} stages in rounds 0 to {config.rounds}; a round: {sizes.games} games to learn from, "
        f"{sizes.extractions} extractions, at most {sizes.samples} training samples, "
        f"{sizes.policy_games + sizes.in_context_games} evaluation games"
    )


def explain(config: RunConfig, auto: Auto) -> list[str]:
    """The derived sizes, a line each, and what the precision `auto` stands for on this machine."""
    sizes, rounds, device = Sizes.of(config), config.rounds, config.engines.device
    collect, consolidate, extract = config.collect, config.consolidate, config.extract
    evaluations = (rounds + 1) * sizes.policy_games + rounds * sizes.in_context_games
    rows = {
        "stages": f"{sizes.stages} in rounds 0 to {rounds}",
        "games": f"T = {collect.extraction_games} and T' = {consolidate.games} a round, {rounds * sizes.games} in all",
        "extraction": f"K x T = {extract.seeds} x {collect.extraction_games}, {sizes.extractions} responses a round",
        "training": f"{consolidate.games_per_step} games x {config.env.max_turns} turns, at most "
        f"{sizes.samples // consolidate.steps} samples a step and {sizes.samples} a round",
        "evaluation": f"{sizes.policy_games} games of the policy and {sizes.in_context_games} in context a round, "
        f"{evaluations} games in all",
    }
    if device != "cuda":
        rows["on CPUs"] = _shares(demands(config, on_gpu=False))
    if device != "cpu":
        rows["on GPUs"] = _shares(demands(config, on_gpu=True))
    if "auto" in precisions(config).values():
        rows["precision"] = f"auto stands for {'bfloat16, on GPUs' if device == 'cuda' else auto}"
        rows["precision"] += "; for bfloat16 on GPUs" * (device == "auto")
    rows["tokens"] = f"at most, beside the prompt; engines.max_model_len={config.engines.max_model_len}"
    rows |= {f"  {reading.name}": _room(reading, config) for reading in readings(config)}
    return [f"{name:<12} {text}" for name, text in rows.items()]


def _shares(wanted: list[Demand]) -> str:
    return f"{amounts(total(wanted))} for {', '.join(map(str, wanted))}; {' and '.join(TURNS)} take turns"


def _room(reading: Reading, config: RunConfig) -> str:
    text = f"{reading.response} of response"
    if reading.knowledge:
        text = f"{reading.knowledge} of knowledge + {text} = {reading.tokens}"
    if reading.by_engine:
        return f"{text}; {config.engines.max_model_len - reading.tokens} are left to the prompt"
    return f"{text}; the model's own context holds the prompt, too"
