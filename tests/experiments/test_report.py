"""What is made of results, and that the committed page is made of the committed results."""

import re
from pathlib import Path

import pytest

from experiments import report
from oel_ray.errors import UserError
from tests.experiments.made_up import point, result, rounds

BETTER = "After consolidation the bare policy is better than it was with the knowledge in its prompt"


def page(*results: report.ArmResult) -> str:
    return report.pages(results)[report.PAGE].decode()


def row(text: str, start: str) -> str:
    (found,) = (line for line in text.splitlines() if line.startswith(f"| {start}"))
    return found


def test_the_committed_page_is_made_of_the_committed_results() -> None:
    made = report.pages(report.read_results(report.RESULTS))
    there = [report.DOCS / report.PAGE, *(report.DOCS / report.FIGURES).glob("*")]
    assert {path.relative_to(report.DOCS).as_posix() for path in there} == set(made)
    for name, content in made.items():
        assert (report.DOCS / name).read_bytes() == content, f"{name}: run python -m experiments.report"


def test_without_results_the_page_says_so_and_names_every_command() -> None:
    text = page()
    assert "No results are committed yet" in text
    for experiment in report.EXPERIMENTS:
        assert f"`python -m experiments.{experiment.name}`" in text
        assert all(claim.text in text for claim in experiment.claims)


def test_every_number_has_an_interval_and_every_claim_a_verdict() -> None:
    text = page(*(rounds(seed) for seed in (0, 1, 2)))
    assert "No results are committed yet" not in text
    assert row(text, "oel | untouched model").startswith("| oel | untouched model | 11.0 ± 2.5 | 120.0 ± 0.0 |")
    assert "| oel | round 1, knowledge of 4 games in the prompt | 34.0 ± 2.5 |" in text
    assert "**holds here** | +23.0 ± 5.0 points" in row(text, "Knowledge in the prompt raises the pass rate (round 1)")
    assert "**holds here** | +33.0 ± 5.0 points" in row(text, "Knowledge in the prompt raises the pass rate (round 2)")
    assert "**cannot be told apart** | -3.0 ± 5.0 points" in row(text, f"{BETTER} (round 2)")
    assert "**holds here** | +10.0 ± 0.0 points" in row(text, "Round 3 leaves a better policy")
    assert "**cannot be told apart** | -3.0 ± 5.0 points" in row(text, f"{BETTER} (round 1)")
    assert "**holds here** | +30.0 ± 0.0 tokens" in row(text, "Responses get shorter")
    assert "python -m experiments.rounds --preset quickstart --seeds 0 1 2" in text


def test_one_repetition_has_no_interval_and_decides_nothing() -> None:
    text = page(rounds(0))
    assert "| oel | untouched model | 10.0 | 120.0 |" in text
    assert "holds here** |" not in text.partition("| the paper's claim |")[2]


def test_arms_are_compared_seed_by_seed_with_the_reference() -> None:
    def arm(label: str, seed: int, rate: float) -> report.ArmResult:
        return result("beyond", label, seed, [point("policy", 1, None, rate)])

    pairs = [(0, 0.2, 0.3), (1, 0.5, 0.61), (2, 0.8, 0.89)]
    text = page(
        *(arm("K-10", seed, high) for seed, _, high in pairs), *(arm("base", seed, low) for seed, low, _ in pairs)
    )
    assert "| base | round 1 | 50.0 ± 74.5 |" in text
    assert "| 60.0 ± 73.3 | 100.0 ± 0.0 | +10.0 ± 2.5 |" in row(text, "K-10 | round 1")
    assert text.index("| base | round 1") < text.index("| K-10 | round 1"), "the reference comes first"


def test_where_nothing_is_claimed_each_arm_ends_better_or_worse_than_the_reference_or_neither() -> None:
    def arm(label: str, seed: int, first: float, last: float) -> report.ArmResult:
        return result("beyond", label, seed, [point("policy", 1, None, first), point("policy", 2, None, last)])

    ends = {"base": (0.5, 0.6, 0.7), "K-1": (0.6, 0.71, 0.79), "K-10": (0.4, 0.49, 0.61), "stale-1": (0.5, 0.7, 0.6)}
    text = page(*(arm(label, seed, 0.3, rate) for label, rates in ends.items() for seed, rate in enumerate(rates)))
    (head,) = (line for line in text.splitlines() if line.startswith("| arm | its policy of"))
    assert head == "| arm | its policy of round 2 is | by how much |"
    assert "| K-1 | **better** | +10.0 ± 2.5 points |" in text
    assert "| K-10 | **worse** | -10.0 ± 2.5 points |" in text
    assert "| stale-1 | **cannot be told apart** | +0.0 ± 24.8 points |" in text
    assert "| base | **" not in text
    assert "its policy of" not in page(arm("base", 0, 0.3, 0.5))
    assert "| K-1 | **cannot be told apart** | - |" in page(arm("base", 0, 0.3, 0.5), arm("K-1", 1, 0.3, 0.5))


def test_repetitions_that_were_asked_for_and_are_missing_are_named() -> None:
    asked = {"arms": ("extracted", "raw"), "seeds": (0, 1, 2)}

    def arm(label: str, seed: int, rate: float) -> report.ArmResult:
        return result("knowledge_vs_raw", label, seed, [point("policy", 1, None, rate)]).model_copy(update=asked)

    extracted = [arm("extracted", 0, 0.5), arm("extracted", 1, 0.6)]
    text = page(*extracted, arm("raw", 0, 0.2))
    assert "**Missing** are, by their seeds, not begun or not ended: extracted with 2; raw with 1, 2." in text
    assert "| extracted | round 1 | 55.0 ± 63.5 (2 of 3) |" in text
    assert "| 20.0 (1 of 3) | 100.0 (1 of 3) | -30.0 (1 of 3) |" in row(text, "raw | round 1")
    assert "+30.0 (1 of 3) points" in row(text, "Consolidated, extracted knowledge is worth more than raw games")
    assert "--seeds 0 1 2" in text
    assert "**Missing**" not in page(rounds(0))


def test_arms_that_were_told_the_same_are_named() -> None:
    def arm(label: str, seed: int, hashes: dict[int, str]) -> report.ArmResult:
        return result("own_vs_other", label, seed, []).model_copy(update={"knowledge_hash": hashes})

    own = [arm("own", 0, {1: "a", 2: "b"}), arm("own", 1, {1: "c"}), arm("own", 2, {})]
    larger = [arm("larger", 0, {1: "a", 2: "b"}), arm("larger", 1, {1: "c", 2: "b"}), arm("larger", 2, {1: "a"})]
    later = [arm("later", 0, {1: "b"}), arm("later", 3, {1: "c"})]
    text = page(*own, *larger, *later)
    assert "the same texts as own, by their seeds: larger in round 1 with 0, 1; larger in round 2 with 0.\n" in text
    assert "the same texts" not in page(*own, *later)
    assert "the same texts" not in page(*larger)


def test_rates_stand_beside_those_of_a_random_and_a_perfect_player() -> None:
    both = "On the same maps a random player wins 1.2 ± 0.0 %, a perfect one wins 100.0 ± 0.0 %."
    assert both in page(rounds(0), rounds(1))
    assert "On the same maps" not in page(rounds(0).model_copy(update={"random": None, "oracle": None}))


def test_what_was_not_measured_is_said_to_be_missing() -> None:
    partial = result("knowledge_vs_raw", "raw", 0, [point("policy", 0, None, 0.1), point("in_context", 1, None, 0.1)])
    text = page(partial)
    assert "| **not measured** | - |" in row(text, "Extracted knowledge in the prompt")


def test_figures_are_the_same_bytes_for_the_same_results_and_show_what_they_are_for() -> None:
    twice = [report.pages([rounds(0), rounds(1)]) for _ in range(2)]
    assert twice[0] == twice[1]
    assert set(twice[0]) == {report.PAGE, *(f"results/quickstart.rounds.{name}.svg" for name in ("rate", "tokens"))}
    assert "games won" in twice[0]["results/quickstart.rounds.rate.svg"].decode()


def test_in_figures_arms_that_coincide_are_all_seen() -> None:
    def arm(label: str) -> report.ArmResult:
        return result("beyond", label, 0, [point("policy", number, None, 0.5) for number in (0, 1)])

    figure = report.pages([arm("base"), arm("K-1")])["results/quickstart.beyond.rate.svg"].decode()
    marks = re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: (#\w+)', figure)
    base, other = ({(x, y) for x, y, its in marks if its == color} for color in report.COLORS[:2])
    assert len(base) == len(other) > 2
    assert not base & other


@pytest.mark.parametrize("hashed", ["settings_hash", "model_hash"])
def test_repetitions_of_different_settings_or_models_are_not_averaged(hashed: str) -> None:
    other = rounds(1).model_copy(update={hashed: "b" * 16})
    with pytest.raises(UserError, match="rounds, oel: repetitions have different settings or models"):
        page(rounds(0), other)


def test_arms_of_different_settings_or_versions_are_not_compared() -> None:
    arms = [result("knowledge_vs_raw", arm, 0, [point("policy", 1, None, 0.1)]) for arm in ("extracted", "raw")]
    for change in ({"settings": ("evaluate.maps=8",)}, {"packages": {"oel-ray": "2.0"}}):
        with pytest.raises(UserError, match="knowledge_vs_raw: results were made with different --set or versions"):
            page(arms[0], arms[1].model_copy(update=change))


def test_the_command_makes_the_same_results_again() -> None:
    it = rounds(0).model_copy(update={"preset": "mine/a-1.7b.yaml", "settings": ("consolidate.keep_steps=[1, 2]",)})
    command = "--preset mine/a-1.7b.yaml --seeds 0 --set 'consolidate.keep_steps=[1, 2]'\n"
    assert f"python -m experiments.rounds {command}" in page(it)
    assert it.file_name == "a-1.7b.rounds.oel.seed-0.json"


def test_results_are_read_unchanged_and_refused_under_another_file_name(tmp_path: Path) -> None:
    it = rounds(0)
    (tmp_path / it.file_name).write_text(it.model_dump_json(indent=1))
    assert report.read_results(tmp_path) == [it]
    (tmp_path / it.file_name).rename(tmp_path / "other.json")
    with pytest.raises(UserError, match=r"other\.json holds quickstart\.rounds\.oel\.seed-0\.json: rename it"):
        report.read_results(tmp_path)
