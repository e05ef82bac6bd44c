"""Pass rates and clustered standard errors against a float64 oracle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oel_ray.play.scores import Evaluation, score, summarize
from oel_ray.records import EvaluationGame, Turn


def turn(tokens: int) -> Turn:
    return Turn(
        observation="o",
        response="r",
        prompt_ids=[1],
        response_ids=[1] * tokens,
        action="[up]",
        feedback="f",
        weight_version="0",
        finish_reason="stop",
    )


def game(map_hash: str, seed: int, success: bool, lengths: tuple[int, ...] = (3,)) -> EvaluationGame:
    return EvaluationGame(
        id=f"h-{map_hash}",
        round=0,
        split="held_out",
        env="FrozenLake-v0",
        params={},
        seed=1,
        map_hash=map_hash,
        instructions="i",
        template="t",
        turns=[turn(length) for length in lengths],
        outcome="end",
        ended_by="environment",
        condition="policy",
        sampling_seed=seed,
        knowledge_seed=None,
        success=success,
    )


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=12), st.randoms())
def test_the_standard_error_is_clustered_by_map(results: list[list[bool]], shuffler) -> None:
    games = [game(str(m), seed, won) for m, wins in enumerate(results) for seed, won in enumerate(wins)]
    shuffler.shuffle(games)
    means = np.array([np.mean(wins, dtype=np.float64) for wins in results])
    expected = means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 1 else 0.0
    assert score(games).pass_rate_se == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert score(games).pass_rate == pytest.approx(np.mean([won for wins in results for won in wins]))


def test_repeating_a_map_does_not_shrink_its_error() -> None:
    once = [game("a", 0, True), game("b", 0, False)]
    often = [game(name, seed, name == "a") for name in "ab" for seed in range(50)]
    assert score(once).pass_rate_se == score(often).pass_rate_se == 0.5


def test_an_evaluation_holds_pass_rate_turn_lengths_and_the_scores_in_context() -> None:
    games = [game("a", 0, True, (2, 4)), game("a", 1, False, (9,)), game("b", 0, False, ()), game("b", 1, False, (1,))]
    numbers = score(games)
    assert (numbers.pass_rate, numbers.games, numbers.seeds) == (0.25, 4, 2)
    assert numbers.response_tokens_per_turn == 4.0
    whole = summarize(games, games[:1], random=0.1, oracle=None)
    assert whole.in_context == score(games[:1])
    assert list(whole.model_dump()) == [
        "pass_rate", "pass_rate_se", "games", "seeds", "response_tokens_per_turn", "random", "oracle", "in_context",
        "in_context_steps", "gate",
    ]  # fmt: skip
    without = summarize(games, [], random=None, oracle=None)
    assert (without.in_context, without.in_context_steps) == (None, ())


def test_earlier_knowledge_has_scores_of_its_own() -> None:
    def read(step: int, won: bool) -> EvaluationGame:
        return game("a", 0, won).model_copy(update={"condition": "in_context", "knowledge_step": step})

    played = [read(7, True), read(7, True), read(4, True), read(1, False), read(4, False)]
    whole = summarize([game("a", 0, False)], played, random=None, oracle=None)
    assert whole.in_context == score(played[:2])
    assert [(part.step, part.pass_rate, part.games) for part in whole.in_context_steps] == [(1, 0.0, 1), (4, 0.5, 2)]
    assert Evaluation.from_json(whole.to_json()) == whole


def test_games_without_turns_have_no_length() -> None:
    assert score([game("a", 0, False, ())]).response_tokens_per_turn == 0.0
