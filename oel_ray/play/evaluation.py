"""Plan and score evaluation games on held-out maps, with or without knowledge in the prompt. Runs in the driver."""

from collections.abc import Sequence

from oel_ray.config.schema import EvaluateConfig, GateConfig
from oel_ray.ids import evaluation_ids
from oel_ray.play.players import Game
from oel_ray.play.scores import Evaluation, passed_gate, summarize
from oel_ray.records import Episode, EvaluationGame, KnowledgeText, Trajectory, read_jsonl
from oel_ray.runs.folder import RunFolder


def plan_games(
    held_out: Sequence[Episode],
    config: EvaluateConfig,
    round_number: int,
    knowledge: Sequence[Sequence[KnowledgeText]] = (),
) -> list[Game]:
    """Plan a game for every held-out map and every sampling seed.

    With `knowledge` this is the teacher's view: every game is played once with each of these sets of texts. The last
    set is complete (see `growth`). The texts of a set take turns over maps and seeds, so each is used in about the same
    number of games.
    """
    sets = knowledge or [()]
    steps = [len(texts[0].steps) if texts else None for texts in sets]
    ids = iter(evaluation_ids(round_number, steps, len(held_out), config.seeds))
    games = []
    for texts in sets:
        for number, episode in enumerate(held_out):
            for seed in range(config.seeds):
                this = episode.model_copy(update={"id": next(ids), "round": round_number})
                text = texts[(number + seed) % len(texts)] if texts else None
                games.append(Game(this, config.sampling.sampling(), text, seed))
    return games


def as_evaluation_game(game: Game, trajectory: Trajectory, success: bool) -> EvaluationGame:
    """Convert a played game into the record that is stored."""
    return EvaluationGame(
        **trajectory.model_dump(),
        condition="in_context" if game.knowledge else "policy",
        sampling_seed=game.sampling_seed,
        knowledge_seed=game.knowledge.seed if game.knowledge else None,
        knowledge_step=len(game.knowledge.steps) if game.knowledge else None,
        success=success,
    )


def score_round(
    folder: RunFolder, number: int, games: list[EvaluationGame], config: GateConfig, baselines: dict[str, float | None]
) -> Evaluation:
    """Compute `evaluation.json` from the games of the new policy and the in-context games in the round's folder."""
    seen, gate = folder.files(number).in_context, None
    if config.enabled and number:
        old = folder.deployed(number)
        played = read_jsonl(folder.files(old).evaluation_games, EvaluationGame)
        gate = passed_gate(old, played, number, games, config)
    in_context = read_jsonl(seen, EvaluationGame) if seen.exists() else []
    return summarize(games, in_context, random=baselines["random"], oracle=baselines["oracle"], gate=gate)
