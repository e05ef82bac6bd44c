"""Which stages a run still has to do, and what each of them reads. Pure; any process.

`Committed` says which stages are in the manifest of each round.
"""

from collections.abc import Collection, Mapping

from oel_ray.config.schema import RunConfig
from oel_ray.errors import UserError
from oel_ray.runs import layout

Committed = Mapping[int, Collection[str]]

PLAYED = frozenset({layout.COLLECT, layout.EVALUATE_IN_CONTEXT, layout.EVALUATE})
"""The stages that need an environment."""

_COLLECT_THEM = "collect them, or give a file with --trajectories"
_GAMES = ("games to extract from", (layout.COLLECT, layout.IMPORT_EXTRACTION), _COLLECT_THEM)
_PREFIXES = ("games to consolidate on", (layout.COLLECT, layout.IMPORT_CONSOLIDATION), _COLLECT_THEM)
_KNOWLEDGE = ("knowledge", (layout.EXTRACT, layout.IMPORT_KNOWLEDGE), "extract it, or give a file with --knowledge")
_POLICY = ("policy", (layout.CONSOLIDATE,), "consolidate first")
# What a stage reads of its own round: its name, the stages any of which leaves it behind, and what to do without it.
_READS = {
    layout.EXTRACT: (_GAMES,),
    layout.EVALUATE_IN_CONTEXT: (_KNOWLEDGE,),
    layout.CONSOLIDATE: (_PREFIXES, _KNOWLEDGE),
    layout.EVALUATE: (_POLICY,),
}


def is_done(stages: Collection[str], name: str) -> bool:
    """Whether a stage is among the committed ones of its round, or imports leave nothing for it to do."""
    if name == layout.EXTRACT:
        return layout.EXTRACT in stages or layout.IMPORT_KNOWLEDGE in stages
    if name == layout.COLLECT and layout.COLLECT not in stages:
        read = layout.IMPORT_EXTRACTION in stages or is_done(stages, layout.EXTRACT)
        return read and (layout.IMPORT_CONSOLIDATION in stages or layout.CONSOLIDATE in stages)
    return name in stages


def unfinished(config: RunConfig, committed: Committed) -> list[tuple[int, str]]:
    """The planned stages that are not done, as (round, stage) in order."""
    return [
        (number, name)
        for number in range(config.rounds + 1)
        for name in planned_stages(config, number)
        if not is_done(committed.get(number, ()), name)
    ]


def check_imports(config: RunConfig, committed: Committed) -> None:
    """Make sure that playing will not replace what was imported.

    Raises:
        UserError: the games of a round are imported in part.
    """
    for number, name in unfinished(config, committed):
        imported = {layout.IMPORT_EXTRACTION, layout.IMPORT_CONSOLIDATION} & set(committed.get(number, ()))
        if name == layout.COLLECT and imported:
            missing = "consolidate" if layout.IMPORT_EXTRACTION in imported else "extract"
            raise UserError(
                f"round {number} has imported games, but none to {missing} with: "
                f"give it some with 'oel {missing} RUN_DIR --round {number} --trajectories FILE'"
            )


def first_open_round(config: RunConfig, committed: Committed, name: str) -> int:
    """The first round that plans a stage and has not done it; 1 if none plans it, which `check_ready` refuses.

    Raises:
        UserError: every round has done it.
    """
    if name not in planned_stages(config, 1):
        return 1
    for number, stage in unfinished(config, committed):
        if stage == name:
            return number
    verb = name.replace("_", " ")
    raise UserError(f"no round is left to {verb}: 'oel show' shows what is there; a new run needs --config")


def check_ready(
    config: RunConfig, committed: Committed, number: int, name: str, incoming: Collection[str] = ()
) -> None:
    """Make sure that one stage can be done now, with the imports that come in for it.

    Raises:
        UserError: the round does not plan the stage, has done it, has what would come in, or lacks what the stage
            reads; says what to do.
    """
    where = f"round {number}: nothing to {name.replace('_', ' ')}"
    if number > config.rounds:
        raise UserError(f"{where}: the run has {config.rounds} rounds; choose another --round")
    if name not in planned_stages(config, number):
        planned_later = name in planned_stages(config, 1)
        reason = "round 0 is the untouched model" if planned_later else "the configuration switches it off"
        raise UserError(f"{where}: {reason}; choose another --round or configuration")
    stages = set(committed.get(number, ()))
    if is_done(stages, name):
        raise UserError(f"{where}: it is done; choose another --round, or start a new run with --config")
    if number > 0 and not is_done(committed.get(number - 1, ()), layout.CONSOLIDATE if number > 1 else layout.PREPARE):
        raise UserError(f"{where} with: round {number - 1} has no policy to start from; finish it first")
    gated = config.gate.enabled and (number > 1 or (number == 1 and name == layout.EVALUATE))
    if gated and layout.EVALUATE not in committed.get(number - 1, ()):
        raise UserError(f"{where} with: the gate compares with round {number - 1}, which is to be evaluated first")
    for what, providers, remedy in _READS.get(name, ()) if number > 0 else ():
        there = stages & set(providers)
        if there and set(providers) & set(incoming):
            raise UserError(f"round {number} has {what} already: leave the file out, or start a new run with --config")
        if not there and not set(providers) & set(incoming):
            raise UserError(f"{where} with: round {number} has no {what}: {remedy}")


def planned_stages(config: RunConfig, round_number: int) -> list[str]:
    """The stages of a round, in order. Round 0 is the untouched model."""
    evaluate = [layout.EVALUATE] if config.evaluate.enabled else []
    if round_number == 0:
        return [layout.PREPARE, *evaluate]
    in_context = [layout.EVALUATE_IN_CONTEXT] if config.evaluate.enabled and config.evaluate.in_context else []
    return [layout.COLLECT, layout.EXTRACT, *in_context, layout.CONSOLIDATE, *evaluate]
