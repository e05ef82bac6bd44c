"""What a run makes no use of needs no room in a context, and what it does make use of needs it everywhere."""

import pytest

from oel_ray.config.budget import budgets, play_response
from oel_ray.config.load import parse_config
from oel_ray.config.schema import RunConfig
from oel_ray.errors import UserError

SHORT = {"sampling": {"max_tokens": 64}}
TIGHT: dict[str, dict[str, object]] = {
    "collect": SHORT,
    "extract": {**SHORT, "max_tokens": 2000},
    "consolidate": SHORT,
    "evaluate": SHORT,
    "engines": {"max_model_len": 4096},
}


def tight(**sections: dict[str, object]) -> RunConfig:
    return parse_config({name: {**TIGHT.get(name, {}), **sections.get(name, {})} for name in {*TIGHT, *sections}})


def test_a_long_answer_in_evaluation_needs_no_room_where_nothing_is_evaluated() -> None:
    long = {"sampling": {"max_tokens": 3000}}
    with pytest.raises(UserError, match=r"beside 5000 tokens .*\(in context\)"):
        tight(evaluate=long)
    config = tight(evaluate={**long, "enabled": False})
    assert play_response(config)[1] < 3000, "nor does it take room from the players"
    assert "in context" not in {budget.name for budget in budgets(config)}


def test_a_long_answer_of_the_extractor_needs_no_room_where_games_are_the_knowledge() -> None:
    long = {"sampling": {"max_tokens": 3000}}
    with pytest.raises(UserError, match=r"beside 5000 tokens .*\(extraction\)"):
        tight(extract=long)
    tight(extract={**long, "format": "raw"})


@pytest.mark.parametrize(("responses", "needs"), [("student", 3000), ("teacher", 5000)])
def test_the_response_that_is_trained_on_needs_room_on_the_engines(responses: str, needs: int) -> None:
    written = {"responses": responses, "sampling": {"max_tokens": 3000}}
    enough = parse_config({**TIGHT, "engines": {"max_model_len": needs + 1}, "consolidate": written})
    assert max(budget.tokens for budget in budgets(enough) if budget.by_engine) == needs
    with pytest.raises(UserError, match=rf"beside {needs} tokens .*lower .*consolidate.sampling.max_tokens"):
        parse_config({**TIGHT, "engines": {"max_model_len": needs}, "consolidate": written})
