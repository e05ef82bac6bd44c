"""The rules that environments keep: the games that run here keep them, and every breach is found by name.

CI checks three of TextArena's games. All that can be played: `pytest tests/envs/test_check.py -m ''` (two minutes).
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from oel_ray.envs import check
from oel_ray.envs.check import RULES, Finding, check_environment
from oel_ray.envs.registry import GROUP, make
from oel_ray.errors import UserError
from tests.support import broken_games
from tests.support.installed import installed

pytestmark = pytest.mark.process

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_environment"
IN_CI = [
    ("FrozenLake-v0", {"size": 3, "num_holes": 2}),
    ("Sokoban-v0", {"num_boxes": 1}),
    ("Slitherlink-v0", {}),
]
IDS = (
    "2048-v0 Bandit-v0 Blackjack-v0 Crosswords-v0 FifteenPuzzle-v0 FrozenLake-v0-random GuessTheNumber-v0 LightsOut-v0 "
    "LogicPuzzle-v0 Mastermind-v0 Minesweeper-v0-small RushHour-v0 Secretary-v0 Set-v0 Sudoku-v0 ThreeCardMonte-v0"
)
ONE_MAP = ["Countdown-v0", "Cryptarithm-v0", "PegJump-v0", "TowerOfHanoi-v0"]

# A name in `broken_games`, and the rules that it breaks.
BROKEN = {
    "BuildRaises": {"build"},
    "BuildExits": {"build"},
    "build_takes_nothing": {"build"},
    "NoHash": {"attributes"},
    "NoInstructions": {"attributes"},
    "ActionsAreText": {"attributes"},
    "ChangesInstructions": {"attributes"},
    "ResetReturnsNothing": {"reset"},
    "ResetIsMissing": {"reset"},
    "RaisesOnEmptyText": {"any text"},
    "ReturnsTuple": {"step"},
    "DoneIsNumber": {"step"},
    "FeedbackIsNothing": {"step"},
    "OutcomeTooEarly": {"outcome"},
    "NoOutcome": {"outcome"},
    "WearsOut": {"long game"},
    "UnreadAction": {"actions"},
    "SuccessIsNothing": {"success"},
    "SuccessIsGiven": {"success"},
    "SuccessNeedsReset": {"success"},
    "WrongSolution": {"solution"},
    "LongSolution": {"solution"},
    "SolutionIsText": {"solution"},
    "SolutionPlays": {"solution"},
    "Clock": {"same seed"},
    "GlobalRandom": {"global random", "random state"},
    "SharedState": {"two games"},
    "SeedsGlobally": {"random state"},
    "UsesHash": {"other process"},
    "OneHash": {"map_hash"},
    "Prints": {"stdout"},
    "Thread": {"threads"},
    "OneMap": {"maps"},
    "SlowStep": {"speed"},
    "SlowBuild": {"speed"},
    "Hopeless": {"attributes"},
}


@pytest.fixture(scope="module", autouse=True)
def games(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The example and the broken games, beside TextArena's."""
    entries = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    entries |= {name: f"{broken_games.__name__}:{name}" for name in ("Good", *BROKEN)}
    entries |= {"absent": "no_such_module:Game"}
    with installed(tmp_path_factory.mktemp("games"), entries, EXAMPLE):
        yield


def told(findings: list[Finding]) -> str:
    return "\n".join(map(str, findings))


@pytest.mark.parametrize(("env_id", "params"), [*IN_CI, ("Lamps-v1", {}), ("Lamps-v1", {"rooms": 3}), ("Good", {})])
def test_a_good_environment_has_no_findings(env_id: str, params: dict) -> None:
    findings = check_environment(env_id, params)
    assert findings == [], told(findings)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", IDS.split())
def test_every_single_player_game_of_textarena_that_runs_here_keeps_all_rules(env_id: str) -> None:
    findings = [finding for finding in check_environment(env_id, {}) if finding.rule != "speed"]
    assert findings == [], told(findings)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ONE_MAP)
def test_games_with_one_map_get_a_note(env_id: str) -> None:
    (finding,) = check_environment(env_id, {})
    assert finding.rule == "maps" and finding.is_note


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_found_by_its_name_and_no_other_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if BROKEN[name] == {"speed"}:
        monkeypatch.setattr(check, "_SLOW_STEP_S", 0.001)
        monkeypatch.setattr(check, "_SLOW_BUILD_S", 0.001)
    findings = check_environment(name, {})
    assert {finding.rule for finding in findings} == BROKEN[name], told(findings)
    for finding in findings:
        assert RULES[finding.rule] in str(finding) and "\n" not in str(finding)


def test_every_rule_is_broken_by_some_test_game() -> None:
    assert set.union(*BROKEN.values()) == set(RULES)


def test_an_exception_names_the_call() -> None:
    assert "building the game of seed 3 raised UserError" in told(check_environment("BuildRaises", {}))
    assert "SystemExit: bye" in told(check_environment("BuildExits", {}))
    assert "step('') raised IndexError" in told(check_environment("RaisesOnEmptyText", {}))
    assert "reading instructions raised OSError: no instructions" in told(check_environment("Hopeless", {}))
    assert "no_such_module" in told(check_environment("absent", {}))


def test_the_checker_prints_nothing_and_leaves_the_random_state_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    import random

    random.seed(8)
    before = random.getstate()
    check_environment("SeedsGlobally", {})
    check_environment("Prints", {})
    assert random.getstate() == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("env_id", "params", "message"),
    [
        ("Nothing", {}, "called 'Nothing'"),
        ("FrozenLake-v0", {"sise": 3}, "did you mean 'size'"),
        ("FrozenLake-v0", {"num_holes": -1}, "num_holes=-1"),
        ("Lamps-v1", {"roms": 3}, "did you mean 'rooms'"),
        ("Lamps-v1", {"rooms": "3"}, "must be of type int"),
    ],
)
def test_a_wrong_id_or_parameter_is_a_user_error_and_no_finding(env_id: str, params: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_environment(env_id, params)


@pytest.mark.parametrize(
    ("env_id", "parts"),
    [
        ("Klondike-v0", ["no valid Python 3.", "line 119", "another game"]),
        ("UltimateTexasHoldem-v0", ["no valid Python 3.", "another game"]),
        ("Hangman-v0", ["python -m nltk.downloader words"]),
        ("Wordle-v0", ["python -m nltk.downloader averaged_perceptron_tagger_eng words"]),
        ("TwentyQuestions-v0", ["OPENROUTER_API_KEY"]),
    ],
)
def test_a_game_that_cannot_run_here_is_refused_with_the_reason_and_no_download(
    env_id: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: pytest.fail("a download"))
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    with pytest.raises(UserError) as caught:
        make(env_id, 1, {})
    assert "\n" not in str(caught.value)
    for part in (env_id, *parts):
        assert part in str(caught.value)
