"""Declare every metric that a run reports through Ray, and report it. Any process of a run.

Ray exports them on every node: the counter `oel_turns` as `ray_oel_turns_total`, others as `ray_` and the name. All
have tags for run, round and stage, and none for a game. Metrics that outlive a stage leave `round` and `stage` empty.
Otherwise Ray would keep exporting one stale series per earlier stage.
"""

import logging
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

SECONDS = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0]
"""Upper bounds of a histogram's buckets, in seconds."""
_METHODS = {"Counter": "inc", "Gauge": "set", "Histogram": "observe"}
_where = {"run": "", "round": "", "stage": ""}
log = logging.LoggerAdapter(logging.getLogger("oel_ray"), _where)
"""Adds run, round and stage to every log record; Ray adds the actor."""


class Spec(NamedTuple):
    """The declaration of a metric. `kind` is Ray's class for it; `tags` are those in addition to the common ones."""

    name: str
    kind: str
    unit: str
    tells: str
    tags: tuple[str, ...] = ()


class Series(Enum):
    """The metrics of a run, from its games to its weights. Counters of other classes use the same names."""

    STAGE_PROGRESS = Spec("oel_stage_progress", "Gauge", "ratio", "Share of the stage that is done")
    STAGE_ETA = Spec("oel_stage_eta_seconds", "Gauge", "s", "Time until the stage is done, as fast as it went so far")
    EPISODES = Spec("oel_episodes", "Counter", "games", "Games by how they ended; failures by their kind", ("status",))
    TURNS = Spec("oel_turns", "Counter", "turns", "Turns of the games that ended")
    TURN_LATENCY = Spec("oel_turn_latency_seconds", "Histogram", "s", "From getting an engine to having its response")
    REQUESTS = Spec("oel_requests", "Counter", "requests", "Requests that engines answered")
    REQUESTS_MOVED = Spec("oel_requests_moved", "Counter", "requests", "Requests that went on to another engine")
    PROMPT_TOKENS = Spec("oel_prompt_tokens", "Counter", "tokens", "Tokens of prompts")
    CACHED_TOKENS = Spec("oel_cached_tokens", "Counter", "tokens", "Tokens of prompts that a prefix cache held")
    RESPONSE_TOKENS = Spec("oel_generated_tokens", "Counter", "tokens", "Tokens that engines wrote")
    ENGINE_HEALTHY = Spec("oel_engine_healthy", "Gauge", "0 or 1", "Whether an engine gets requests", ("engine",))
    ENGINE_RESTARTS = Spec("oel_engine_restarts", "Counter", "engines", "Engines that were replaced")
    KNOWLEDGE_ITEMS = Spec("oel_knowledge_items", "Counter", "items", "Items accepted, or why not", ("outcome",))
    KL_PER_TOKEN = Spec("oel_reverse_kl", "Gauge", "nats/token", "Divergence of student and teacher in a step")
    GRAD_NORM = Spec("oel_grad_norm", "Gauge", "1", "Norm of a step's gradient before clipping")
    LEARNING_RATE = Spec("oel_learning_rate", "Gauge", "1", "Learning rate of a step")
    TRAINED_TOKENS = Spec("oel_trained_tokens_per_second", "Gauge", "tokens/s", "Response tokens that a step reads")
    SKIPPED_STEPS = Spec("oel_skipped_steps", "Counter", "steps", "Steps whose loss or gradient was not finite")
    STEP_SECONDS = Spec("oel_step_seconds", "Gauge", "s", "What a step takes: generate, train, sync", ("phase",))
    SYNC_BYTES = Spec("oel_weight_sync_bytes", "Counter", "bytes", "Weights sent, counted once for all engines")
    WEIGHT_ROUND = Spec("oel_weight_version_round", "Gauge", "round", "Round of the weights that the engines serve")
    WEIGHT_STEP = Spec("oel_weight_version_step", "Gauge", "step", "Their step in that round; 0 for its policy")
    PASS_RATE = Spec("oel_pass_rate", "Gauge", "ratio", "Held-out games that the round's policy won")


def enter(round_number: int, stage: str) -> None:
    """Label all later reports of this process with a round and a stage."""
    import ray

    run = ray.get_runtime_context().namespace.removeprefix("oel-") if ray.is_initialized() else ""
    _where.update(run=run, round=str(round_number), stage=stage)


def report(series: Series, value: float | None, **tags: str) -> None:
    """Add to a counter, set a gauge or observe for a histogram. Does nothing for None, or without Ray."""
    import ray

    kind = series.value.kind
    if value is not None and ray.is_initialized() and (value > 0 or kind != "Counter"):
        getattr(_made(series.value), _METHODS[kind])(value, tags=_where | tags)


@cache
def _made(spec: Spec) -> Any:
    """Create Ray's object of a metric."""
    from ray.util import metrics

    settings = {"boundaries": SECONDS} if spec.kind == "Histogram" else {}
    tells = f"{spec.tells} ({spec.unit})"
    return getattr(metrics, spec.kind)(spec.name, tells, tag_keys=(*_where, *spec.tags), **settings)
