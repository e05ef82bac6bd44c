"""Names, entry points and the errors that a person reads."""

import subprocess
import sys
from pathlib import Path

import pytest

from oel_ray.envs import make
from oel_ray.envs.registry import known_ids
from oel_ray.errors import UserError

PLUGIN = """
from oel_ray.envs.base import Step

class Coin:
    instructions = "Guess."
    actions = ("[heads]", "[tails]")

    def __init__(self, seed, params):
        self.side = self.actions[(seed + params.get("shift", 0)) % 2]
        self.map_hash = self.side
        self.won = False

    def reset(self):
        return "A coin lies covered."

    def step(self, response):
        self.won = self.side in response
        return Step(response, "", True, "It was " + self.side)

    def success(self):
        return self.won

    def solution(self):
        return [self.side]

def broken(seed, params):
    return params["missing"]

def tuned(seed, params):
    coin = Coin(seed, {})
    coin.instructions = repr(sorted(params.items()))
    return coin

tuned.defaults = {"sides": 2, "name": "coin"}
"""


@pytest.mark.process
def test_an_installed_package_adds_environments_and_comes_first(tmp_path: Path) -> None:
    (tmp_path / "coin_game.py").write_text(PLUGIN)
    info = tmp_path / "coin_game-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: coin-game\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[oel_ray.environments]\ncoin = coin_game:Coin\nFrozenLake-v0 = coin_game:Coin\nbroken = coin_game:broken\n"
        "tuned = coin_game:tuned\nabsent = no_such_module:game\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from oel_ray.envs import make\n"
        "from oel_ray.errors import UserError\n"
        "game = make('coin', 3, {'shift': 1})\n"
        "assert game.step('[heads]').done and game.success()\n"
        "assert make('FrozenLake-v0', 1, {}).reset() == 'A coin lies covered.'\n"
        "assert 'textarena' not in sys.modules\n"
        "try: make('broken', 1, {'a': 2})\n"
        "except UserError as error: print(error)\n"
        "print(make('tuned', 1, {'sides': 6}).instructions)\n"
        "for name, params in (('tuned', {'side': 6}), ('tuned', {'sides': 'x'}), ('absent', {})):\n"
        "    try: make(name, 1, params)\n"
        "    except UserError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'broken'" in run.stdout and "missing" in run.stdout and "{'a': 2}" in run.stdout
    lines = run.stdout.splitlines()[1:]
    assert lines[0] == "[('name', 'coin'), ('sides', 6)]"
    assert "has no parameter 'side': did you mean 'sides'?" in lines[1]
    assert "'sides' must be of type int" in lines[2]
    assert "'absent' (no_such_module:game) cannot be loaded: ModuleNotFoundError" in lines[3]


@pytest.mark.process
def test_importing_the_package_imports_no_textarena() -> None:
    code = "import oel_ray.envs.splits, oel_ray.envs.baselines, oel_ray.envs.replay, oel_ray.play.player, sys\n"
    code += "assert not {'textarena', 'ray', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("env_id", "params", "parts"),
    [
        ("FrozenLak-v0", {}, ["'FrozenLak-v0'", "'FrozenLake-v0'"]),
        ("Chess-v0", {}, ["'Chess-v0'"]),
        ("FrozenLake-v0-raw", {}, ["'FrozenLake-v0'"]),
        ("FrozenLake-v0", {"sise": 3}, ["FrozenLake-v0", "'sise'", "'size'"]),
        ("FrozenLake-v0", {"size": "big"}, ["FrozenLake-v0", "'size'", "int", "'big'"]),
        ("FrozenLake-v0", {"size": True}, ["'size'", "int"]),
        ("FrozenLake-v0", {"num_holes": -1}, ["FrozenLake-v0", "num_holes=-1"]),
        ("Sokoban-v0", {"dim_room": [1, 1]}, ["Sokoban-v0", "dim_room=[1, 1]"]),
    ],
)
def test_a_wrong_environment_or_parameter_is_refused_in_one_line(env_id: str, params: dict, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make(env_id, 1, params)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_the_known_ids_hold_single_player_games_only() -> None:
    names = known_ids()
    assert {"FrozenLake-v0", "FrozenLake-v0-random", "Sokoban-v0-medium", "2048-v0"} <= set(names)
    assert not [name for name in names if name.startswith("Chess") or name.endswith("-raw")]
