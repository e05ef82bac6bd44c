"""Evaluation: held-out maps, several sampling seeds, with knowledge in the prompt or without. Runs in the driver."""

from collections.abc import Sequence

from oel_ray.collect.stage import Game
from oel_ray.config import EvaluateConfig
from oel_ray.records import Episode, EvaluationGame, KnowledgeText, Trajectory


def evaluation_games(
    held_out: Sequence[Episode],
    config: EvaluateConfig,
    round_number: int,
    knowledge: Sequence[Sequence[KnowledgeText]] = (),
) -> list[Game]:
    """Every held-out map with every sampling seed.

    With `knowledge` this is the teacher's view: every game once with each of these sets of texts, the last of which is
    complete (see `growth`). The texts of a set take turns over maps and seeds, so that each is read on about as many
    games as any other.
    """
    games = []
    for texts in knowledge or [()]:
        step = f"-n{len(texts[0].steps)}" if texts and texts is not knowledge[-1] else ""
        for number, episode in enumerate(held_out):
            for seed in range(config.seeds):
                name = f"r{round_number:03d}-{'k' if texts else 'p'}-{episode.id}-s{seed}{step}"
                this = episode.model_copy(update={"id": name, "round": round_number})
                text = texts[(number + seed) % len(texts)] if texts else None
                games.append(Game(this, config.sampling.sampling(), text, seed))
    return games


def evaluated(game: Game, trajectory: Trajectory, success: bool) -> EvaluationGame:
    """A game of an evaluation as it is kept."""
    return EvaluationGame(
        **trajectory.model_dump(),
        condition="in_context" if game.knowledge else "policy",
        sampling_seed=game.sampling_seed,
        knowledge_seed=game.knowledge.seed if game.knowledge else None,
        knowledge_step=len(game.knowledge.steps) if game.knowledge else None,
        success=success,
    )
