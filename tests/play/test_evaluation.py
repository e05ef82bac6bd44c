"""Which games an evaluation plays, and what is kept of them."""

from collections.abc import Sequence

from oel_ray.config.schema import EvaluateConfig
from oel_ray.extract.items import growth
from oel_ray.ids import held_out_id
from oel_ray.play.evaluation import as_evaluation_game, plan_games
from oel_ray.records import Episode, EvaluationGame, KnowledgeText, Trajectory
from tests.support import example_run


def evaluate(knowledge: Sequence[Sequence[KnowledgeText]]) -> tuple[list[EvaluationGame], list[str]]:
    """The games as they are kept, and the knowledge in their prompts."""
    drawn = {"round": 0, "split": "held_out", "env": "e", "params": {}}
    maps = [Episode(id=held_out_id(n), seed=n, map_hash=f"m{n}", **drawn) for n in range(2)]
    planned = plan_games(maps, EvaluateConfig(seeds=2), 1, knowledge)
    end = {"instructions": "", "template": "", "turns": [], "outcome": "", "ended_by": "environment"}
    played = [as_evaluation_game(game, Trajectory(**game.episode.model_dump(), **end), True) for game in planned]
    return played, [game.knowledge.text if game.knowledge else "" for game in planned]


def test_the_bare_policy_plays_every_map_with_every_seed() -> None:
    games, prompts = evaluate([])
    assert [game.id for game in games] == [
        "r001-p-h-0000-s0",
        "r001-p-h-0000-s1",
        "r001-p-h-0001-s0",
        "r001-p-h-0001-s1",
    ]
    assert {(game.condition, game.knowledge_seed, game.knowledge_step) for game in games} == {("policy", None, None)}
    assert set(prompts) == {""}


def test_knowledge_is_played_as_it_was_at_every_step_and_complete() -> None:
    texts = [example_run.knowledge_text(1, seed) for seed in range(2)]
    games, prompts = evaluate(growth(texts, [1]))
    assert len({game.id for game in games}) == len(games) == 8
    assert [game.id for game in games][3:5] == ["r001-k-h-0001-s1-n1", "r001-k-h-0000-s0"]
    assert [game.knowledge_step for game in games] == [1] * 4 + [2] * 4
    assert [game.knowledge_seed for game in games] == [0, 1, 1, 0] * 2
    assert prompts == ["- EXPERIENCE ITEM: thing 0"] * 4 + ["- EXPERIENCE ITEM: thing 1"] * 4
    assert {game.condition for game in games} == {"in_context"}
