"""The runs that several experiments share, so that they are made once. Any process; pure."""

from experiments.records import Arm, Import, Imported, Recipe, Start
from oel_ray.records import TrainingSplit

GAMES: tuple[TrainingSplit, ...] = ("extraction", "consolidation")
"""What a run takes that differs behind the games, from extraction on."""
TEXTS: tuple[Imported, ...] = ("consolidation", "knowledge")
"""What a run takes that differs in consolidation alone."""


def base(start: Start) -> Recipe:
    """Three rounds as they come, measured while knowledge grows, with the policies inside the rounds kept."""
    games, steps = start.config.collect.extraction_games, start.config.consolidate.steps
    read = sorted({1, games // 4, games // 2} - {0, games})
    kept = sorted({steps // 3, 2 * steps // 3} - {0, steps})
    return start.recipe("base", "rounds=3", f"evaluate.accumulation_steps={read}", f"consolidate.keep_steps={kept}")


def taken(source: Recipe, number: int, *whats: Imported) -> tuple[Import, ...]:
    """What a round of another run left behind, as imports."""
    return tuple(Import(source=source, round=number, what=what) for what in whats)


def one_round(label: str, recipe: Recipe) -> Arm:
    return Arm(label=label, recipe=recipe, rounds=1)
