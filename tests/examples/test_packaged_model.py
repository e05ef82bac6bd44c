"""The micro model that comes with the package: what it is, and that it can do what its card says."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.micro_model import evaluate
from examples.micro_model.publish import CARD, FIGURES, PACKAGE, card
from examples.micro_model.tokenizer import build_tokenizer
from examples.micro_model.worlds import REAL, World, worlds
from oel_ray.models.resolve import MICRO, resolve_model
from oel_ray.text.chat import ChatFormat

MAPS = 32


@pytest.fixture(scope="module")
def model() -> evaluate.Model:
    return evaluate.Model(resolve_model(MICRO, print), seed=0)


def play(model: evaluate.Model, state: str, known: list[World]) -> list[evaluate.Finished]:
    rng = random.Random(state)
    chosen = [known[number % len(known)] for number in range(MAPS)]
    games = [(world, number, evaluate.knowledge(state, world, rng)) for number, world in enumerate(chosen)]
    return evaluate.play(model, games)[0]


def pass_rate(finished: list[evaluate.Finished]) -> float:
    return sum(game.won for game in finished) / len(finished)


def test_the_packaged_model_is_a_small_qwen3_with_the_tokenizer_that_this_code_builds() -> None:
    assert resolve_model(MICRO, print) == PACKAGE
    policy = AutoModelForCausalLM.from_pretrained(PACKAGE)
    assert policy.config.architectures == ["Qwen3ForCausalLM"]
    assert policy.dtype == torch.bfloat16
    assert 2e6 <= sum(parameter.numel() for parameter in policy.parameters()) <= 5e6
    assert sum(file.stat().st_size for file in PACKAGE.iterdir()) < 12e6
    packaged, built = AutoTokenizer.from_pretrained(PACKAGE), build_tokenizer()
    assert packaged.get_vocab() == built.get_vocab(), "train and publish the model again"
    assert packaged.chat_template == built.chat_template
    ChatFormat.from_pretrained(PACKAGE, thinking=True).check_thinking()


def test_the_model_card_holds_the_measured_numbers() -> None:
    figures = json.loads((PACKAGE / FIGURES).read_text())
    parameters = sum(value.numel() for value in AutoModelForCausalLM.from_pretrained(PACKAGE).parameters())
    assert (PACKAGE / CARD).read_text() == card(figures, parameters)
    for place in figures.values():
        assert place["pass rate, all"] >= evaluate.GATE["all"]
        assert place["pass rate, none"] <= evaluate.GATE["none"]
        assert place["extraction precision"] >= 0.9
        assert place["extraction recall"] >= 0.7


@pytest.mark.parametrize(
    "known",
    [pytest.param([World(*REAL)], id="real"), pytest.param(worlds("held_out"), id="held-out", marks=pytest.mark.slow)],
)
def test_the_packaged_model_plays_by_its_knowledge_and_extracts_what_it_saw(
    model: evaluate.Model, known: list[World]
) -> None:
    told, ignorant = play(model, "all", known), play(model, "none", known)
    assert pass_rate(told) >= 0.5
    assert pass_rate(ignorant) <= 0.35
    assert pass_rate(play(model, "wrong", known)) <= 0.25, "it does not go by what it is told"
    assert pass_rate(play(model, "strangers", known)) <= 0.35, "it does not go by what it is told"
    precision, recall = evaluate.extraction(model, told + ignorant)
    assert precision >= 0.9
    assert recall >= 0.7
