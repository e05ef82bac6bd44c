import pytest
from hypothesis import given
from hypothesis import strategies as st

from oel_ray.extract.items import admit, fit, growth, structured_items, unstructured_items
from oel_ray.records import join_items
from oel_ray.text.prompts import ITEM_MARKER
from tests.support import example_run

M = ITEM_MARKER


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    ("answer", "statements"),
    [
        ("", []),
        ("no marker at all\n- item", []),
        (f"{M} holes kill", ["holes kill"]),
        (f"thoughts\n{M} one\n{M} two\nmore", ["one", "two"]),
        (f"{M} one {M} two", ["one", "two"]),
        (f"so: {M} one", ["one"]),
        (f"{M} one\n  which goes on here\n{M} two", ["one", "two"]),
        (f"{M}\n{M}   \n{M} one", ["one"]),
        (f"{M} {M} one", ["one"]),
        (f"{M} one\r\n{M} two\r\n", ["one", "two"]),
        (f"   {M}one", ["one"]),
        (f"{M} Löcher töten 🕳\u2028continued", ["Löcher töten 🕳"]),
        (f"{M.lower()} one", []),
        ("x" * 100_000 + f"{M} one", ["one"]),
        (f"{M} " + "y" * 100_000, ["y" * 100_000]),
    ],
)
def test_structured_keeps_only_marked_statements(answer: str, statements: list[str]) -> None:
    assert structured_items(answer) == [f"{M} {statement}" for statement in statements]


@given(st.text())
def test_structured_items_survive_being_parsed_again(text: str) -> None:
    items = structured_items(f"{M} {text}")
    assert structured_items(join_items(items)) == items
    assert all(len(item.splitlines()) == 1 for item in items)


@pytest.mark.parametrize(
    ("answer", "items"), [("", []), (" \n ", []), ("\none\n\ntwo\r\n", ["one\n\ntwo"]), (f"{M} x", [f"{M} x"])]
)
def test_an_unstructured_answer_is_one_item(answer: str, items: list[str]) -> None:
    assert unstructured_items(answer) == items


texts = st.lists(st.text("ab \n", min_size=1, max_size=30), max_size=12)


@given(texts, st.integers(0, 20))
def test_fit_drops_only_the_oldest_and_no_more_than_it_must(items: list[str], budget: int) -> None:
    kept, dropped = fit(items, budget, words)
    assert kept == items[dropped:]
    assert words(join_items(kept)) <= budget
    if dropped:
        assert words(join_items(items[dropped - 1 :])) > budget


@given(texts, texts, st.integers(0, 20))
def test_an_item_that_is_too_long_never_empties_the_store(items: list[str], held: list[str], budget: int) -> None:
    store, rejected = admit(items, held, budget, words)
    assert set(store) == {item for item in items if words(item) <= budget} - set(held)
    assert len(set(store)) == len(store) == len(items) - rejected.total()
    assert rejected["over_long"] == sum(words(item) > budget for item in items)
    kept, _ = fit(store, budget, words)
    assert bool(kept) == bool(store)
    assert kept[-1:] == store[-1:]


def test_growth_gives_each_text_after_the_steps_asked_for_and_only_whole_ones_without_steps() -> None:
    texts = [example_run.knowledge_text(1, seed) for seed in range(2)]
    early, complete = growth(texts, [9, 1, 2, 1])
    assert [text.text for text in early] == ["- EXPERIENCE ITEM: thing 0"] * 2
    assert [(text.id, len(text.steps)) for text in early] == [("r001-k00", 1), ("r001-k01", 1)]
    assert complete == texts
    elsewhere = [text.model_copy(update={"steps": []}) for text in texts]
    assert growth(elsewhere, [1]) == [elsewhere]
