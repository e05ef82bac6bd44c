"""`oel envs` and `oel check-env` as they are typed: exit codes, one line per error, what is printed."""

from collections.abc import Callable, Iterator

import pytest

from oel_ray.cli.main import main
from tests.support.installed import installed

Oel = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def games(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    names = ("Good", "OneMap", "Prints")
    entries = {name: f"tests.support.broken_games:{name}" for name in names}
    with installed(tmp_path_factory.mktemp("games"), entries):
        yield


@pytest.fixture
def oel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Oel:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["oel", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    monkeypatch.setenv("COLUMNS", "80")
    return run


def test_oel_envs_lists_installed_games_and_those_of_textarena(oel: Oel) -> None:
    code, output, errors = oel("envs")
    assert (code, errors) == (0, "")
    assert output.index("games-for-tests") < output.index("Good") < output.index("2048-v0")


def test_oel_envs_with_an_id_measures_it_with_the_turns_asked_for(oel: Oel) -> None:
    code, output, errors = oel("envs", "FrozenLake-v0", "size=3", "num_holes=2", "--turns", "3")
    assert (code, errors) == (0, "")
    assert "measured with 3 turns" in output and "0.0% won" in output


@pytest.mark.process
def test_check_env_fails_only_if_a_rule_is_broken(oel: Oel) -> None:
    code, output, errors = oel("check-env", "Good")
    assert (code, errors) == (0, "")
    assert output.startswith("Good can be played; checked: build,") and output.count("\n") == 1
    code, output, errors = oel("check-env", "OneMap")
    assert (code, errors) == (0, "")
    assert output.startswith("maps (note): 32 seeds drew one and the same map; ")
    code, output, errors = oel("check-env", "Prints")
    assert code == 1
    assert output.startswith("stdout: ") and output.count("\n") == 1
    assert errors == "oel: Prints breaks 1 of 20 rules\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["envs", "FrozenLak-v0"], "did you mean 'FrozenLake-v0'?"),
        (["envs", "size=3"], "ID comes before 'size=3'"),
        (["envs", "FrozenLake-v0", "size"], "write key=value"),
        (["envs", "FrozenLake-v0", "sise=3"], "did you mean 'size'?"),
        (["envs", "FrozenLake-v0", "--turns", "0"], "--turns"),
        (["check-env"], "Missing argument 'ID'"),
        (["check-env", "Nothing"], "called 'Nothing'"),
        (["check-env", "FrozenLake-v0", "size=big"], "must be of type int"),
        (["check-env", "Klondike-v0"], "choose another game"),
    ],
)
def test_a_mistake_in_an_environment_command_is_one_line(oel: Oel, arguments: list[str], message: str) -> None:
    code, output, errors = oel(*arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("oel: error: ") and message in errors and errors.count("\n") == 1
