"""Wrap any single-player TextArena game as an environment. Runs wherever environments run, never in threads.

TextArena seeds the process-wide `random` and keeps state in modules. So every call runs under the game's own random
state and restores the caller's afterwards. Games are played raw, because TextArena's wrappers accumulate text over
resets and join the rules to the board. Messages of TextArena are filtered by type.
"""

import ast
import contextlib
import importlib
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oel_ray.envs.base import Step
from oel_ray.envs.solvers import MOVES, solve_frozen_lake, solve_sokoban
from oel_ray.errors import UserError, one_line
from oel_ray.records import Params, content_hash
from oel_ray.text.chat import THINK_CLOSE

# No game reads a move in this text.
_UNREADABLE = "no valid action"

# ASCII: without it, ignoring case lets U+017F, a long s, pass for "s".
_MOVE = re.compile(r"\[\s*(up|down|left|right|w|a|s|d)\s*\]", re.IGNORECASE | re.ASCII)
_BRACKETED = re.compile(r"\[[^\[\]]*\]")
_DOWNLOADED = re.compile(r"""nltk\.download\(['"](\w+)['"]""")
_ALIASES = {"w": "up", "a": "left", "s": "down", "d": "right"}

_ACTIONS_TEXT = (
    "You make one move per turn. The actions are [up], [down], [left] and [right], or for the same four, in the same "
    "order, [w], [s], [a] and [d]. Write your action with its square brackets."
)


class _GridGame(NamedTuple):
    """The project's own data on a game whose rules it hides."""

    instructions: str
    content: Callable[[Any], tuple[Any, ...]]
    solve: Callable[..., list[str] | None]


_GRID_GAMES = {
    "FrozenLake-v0": _GridGame(
        f"You are P on the board. Get to the goal in as few moves as you can. {_ACTIONS_TEXT}",
        lambda game: ([*map(list, game.state.game_state["grid"])], tuple(game.state.game_state["player_pos"])),
        solve_frozen_lake,
    ),
    "Sokoban-v0": _GridGame(
        f"You are P on the board. Finish the puzzle in as few moves as you can. {_ACTIONS_TEXT}",
        lambda game: (game.room_fixed.tolist(), game.room_state.tolist()),
        solve_sokoban,
    ),
}


# Games that lay out their board only at the first move. Before that only the random state distinguishes two of them.
_DRAWN_LATER = ("Minesweeper-v0",)


class TextArenaEnvironment:
    """One game of a single-player TextArena id. See `oel_ray.envs.base.Environment`."""

    def __init__(self, env_id: str, seed: int, params: Params) -> None:
        """Build the game and draw its content.

        Raises:
            UserError: the game cannot be built with these parameters.
        """
        self._random = random.Random(seed).getstate(), np.random.RandomState(seed % 2**32).get_state()
        try:
            with self._isolated():
                self._game = _textarena().make(f"{env_id}-raw", **params)
                self._game.reset(num_players=1, seed=seed)
                _mend(self._game.state)
                messages = self._game.get_observation()[1]
        except Exception as error:
            values = ", ".join(f"{name}={value!r}" for name, value in params.items()) or "its default parameters"
            raise UserError(f"{env_id} cannot be built with {values}: {one_line(error)}") from error

        kinds = _textarena().ObservationType
        self._hidden = (kinds.PROMPT, kinds.PLAYER_ACTION)
        self._first = self._shown(messages)
        grid_game = next((known for prefix, known in _GRID_GAMES.items() if env_id.startswith(prefix)), None)
        self.actions: Sequence[str] = tuple(MOVES) if grid_game else ()
        self._solve: Callable[[], list[str] | None] = lambda: None
        if grid_game:
            content = grid_game.content(self._game)
            self._solve = lambda: grid_game.solve(*content)
            self.instructions = grid_game.instructions
        else:
            self.instructions = "\n\n".join(text.strip() for _, text, kind in messages if kind == kinds.PROMPT)
            # A hidden number or deck is part of the map, although no text shows it.
            content = (self.instructions, self._first, _plain(self._game.state.game_state))
            if env_id.startswith(_DRAWN_LATER):
                content += (str(self._random[0]),)
        self.map_hash = content_hash(env_id, *content)

    def reset(self) -> str:
        return self._first

    def step(self, response: str) -> Step:
        action = read_action(response, moves_only=bool(self.actions))
        with self._isolated():
            done, _ = self._game.step(action=action or _UNREADABLE)
            feedback = self._shown(self._game.get_observation()[1])
        return Step(action, feedback, bool(done), self._reason() if done else "")

    def success(self) -> bool:
        # Partial progress is paid too, e.g. two thirds for a fall close to the goal.
        rewards = self._game.close()[0]
        return bool(rewards) and rewards[0] >= 1.0

    def solution(self) -> list[str] | None:
        return self._solve()

    def _shown(self, messages: Sequence[tuple[int, str, Any]]) -> str:
        # Three games swap the arguments for a player's action, so a number is in the place of the text.
        texts = (text.strip("\n") for _, text, kind in messages if kind not in self._hidden and isinstance(text, str))
        return "\n\n".join(text for text in texts if text.strip())

    def _reason(self) -> str:
        return str(self._game.close()[1][0].get("reason") or "The game ended.")

    @contextlib.contextmanager
    def _isolated(self) -> Iterator[None]:
        """Run the block under the game's own random state, then restore the caller's. Prints of a game go to stderr."""
        outer = random.getstate(), np.random.get_state()
        random.setstate(self._random[0])
        np.random.set_state(self._random[1])
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            self._random = random.getstate(), np.random.get_state()
            random.setstate(outer[0])
            np.random.set_state(outer[1])


def read_action(response: str, *, moves_only: bool) -> str:
    """Read the last bracketed token after a closed thinking block, or of the whole response if none was closed.

    With `moves_only` the token must be a move. The result is then "[up]", "[down]", "[left]" or "[right]", or "" if
    there is none. Otherwise the token is returned unchanged, and an answer without brackets as a whole.
    """
    answer = response.rpartition(THINK_CLOSE)[2]
    if not moves_only:
        return str([answer.strip(), *_BRACKETED.findall(answer)][-1])
    moves = [move.lower() for move in _MOVE.findall(answer)]
    return f"[{_ALIASES.get(moves[-1], moves[-1])}]" if moves else ""


def single_player_ids() -> list[str]:
    """List the TextArena ids that one player can play."""
    return sorted(_sources())


def _textarena() -> Any:
    return importlib.import_module("textarena")


@lru_cache(maxsize=128)
def parameters(env_id: str) -> dict[str, Any]:
    """List the parameters of a game with their defaults, from its source text. Nothing is imported or downloaded.

    Raises:
        UserError: the game cannot be played here, and why.
    """
    source = _sources()[env_id]
    text = source.file.read_text(encoding="utf-8")
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise UserError(
            f"{env_id} cannot be played: TextArena's code for it is no valid Python {python} "
            f"(line {error.lineno}: {error.msg}); choose another game"
        ) from error
    if missing := [name for name in _DOWNLOADED.findall(text) if not _is_downloaded(name)]:
        raise UserError(
            f"{env_id} needs word lists: on every machine that plays run python -m nltk.downloader {' '.join(missing)}"
        )
    if "OpenRouterAgent(" in text and "OPENROUTER_API_KEY" not in os.environ:
        raise UserError(f"{env_id} asks a model behind a web service: set OPENROUTER_API_KEY")
    return _constructor_defaults(tree, source.class_name) | source.registered


class _Source(NamedTuple):
    file: Path
    class_name: str
    registered: dict[str, Any]


@lru_cache(maxsize=1)
def _sources() -> dict[str, _Source]:
    """Find the source of every single-player game, and the parameters that its id stands for.

    Reads the source text, because an import of the games would download word lists and fail on the broken ones.
    """
    packages = Path(_textarena().__file__).parent.parent
    found = {}
    for name, spec in importlib.import_module("textarena.envs.registration").ENV_REGISTRY.items():
        module, _, class_name = str(spec.entry_point).partition(":")
        file = packages / (module.replace(".", "/") + ".py")
        if name.endswith("-raw") and file.is_file() and "SinglePlayerState(" in file.read_text(encoding="utf-8"):
            found[name.removesuffix("-raw")] = _Source(file, class_name, spec.kwargs)
    return found


def _mend(state: Any) -> None:
    """Let `set_invalid_move` accept its reason and reward in either order, because four games swap them."""
    take = state.set_invalid_move

    def set_invalid_move(reason: Any, reward: Any = -1.0) -> None:
        if isinstance(reward, str):
            reason, reward = reward, reason
        take(reason=reason, reward=reward)

    state.set_invalid_move = set_invalid_move


def _constructor_defaults(tree: ast.Module, class_name: str) -> dict[str, Any]:
    game = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name), None)
    for function in game.body if game else ():
        if isinstance(function, ast.FunctionDef) and function.name == "__init__":
            names = [argument.arg for argument in function.args.args[1:]]
            values = [ast.literal_eval(value) for value in function.args.defaults]
            return dict.fromkeys(names) | dict(zip(names[len(names) - len(values) :], values, strict=True))
    return {}


def _is_downloaded(name: str) -> bool:
    data = importlib.import_module("nltk.data")
    for kind in ("corpora", "taggers"):
        with contextlib.suppress(LookupError):
            data.find(f"{kind}/{name}")
            return True
    return False


def _plain(value: Any) -> Any:
    """Extract the plain data of a game's state, in a form that is the same in every process."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(_plain(item)) for item in value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value if isinstance(value, (str, int, float, bool)) else None
