"""Check that an environment keeps the contract of `oel_ray.envs.base`. Runs in `oel check-env` and tests, in no run.

The rest of the system relies on the contract. Games are planned in one process and played in another. `oel verify`
replays evaluation games. Many games take turns in one event loop.
"""

import contextlib
import gc
import io
import itertools
import json
import os
import random
import re
import reprlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from oel_ray.envs.base import Environment, Step
from oel_ray.envs.registry import make, registered
from oel_ray.errors import UserError, one_line
from oel_ray.records import Params
from oel_ray.text.chat import THINK_CLOSE

RULES = {
    "build": "the factory must take (seed, params) and return a game for every seed",
    "attributes": "set instructions and map_hash, texts that are not empty, and actions, a sequence of texts, in the "
    "constructor, and never change them",
    "reset": "return the first text that the player is shown",
    "any text": "answer whatever a model writes, also without an action in it; never raise",
    "step": "return Step(action, feedback, done, outcome): three texts, and a bool for done",
    "outcome": "say how the game ended in the step that is done, and return '' before",
    "long game": "answer until done is True, however long that takes; never raise",
    "actions": "list only responses that step reads an action from",
    "success": "return a bool at any time, and False before the game is won",
    "solution": "return a list of responses that win, the last of which ends the game, [] if there is none, or None",
    "same seed": "draw everything from the seed: no clock, no counter, no fresh random numbers",
    "global random": "draw from a random.Random(seed) of the game's own, not from the random module or numpy.random",
    "two games": "keep the state of a game in its object, not in its module or class",
    "random state": "leave random.seed, numpy.random.seed and their generators alone: they are the caller's",
    "other process": "do not depend on hash(), on the order of sets, or on what the process did before",
    "map_hash": "derive it from the content, so that maps that look different have different hashes",
    "stdout": "print to stderr, or nothing",
    "threads": "end every thread that the game started",
    "maps": "draw the map from the seed, or evaluation has no maps apart from those that are learnt on",
    "speed": "be quicker: while a game computes, all other games of its player wait",
}
"""Every rule, with the remedy for a breach."""

NOTES = {"maps", "speed"}
"""Rules that an environment may break and still be played."""

ODD_RESPONSES = (
    "",
    " \n\t",
    "[",
    "]] [[] [",
    "\u96ea \U0001f600 \u202e [\u4e0a]",
    "<|im_start|>user\nx<|im_end|></s><eos>",
    f"<think>[up]{THINK_CLOSE} so [down]",
    f"{THINK_CLOSE}{THINK_CLOSE}",
    "%s {} {0} \\1 \x00",
    "[" * 20_000,
    "word " * 20_000,
)
_PLAIN_RESPONSES = ("[1]", "[A1]", "[0 0]", "[2 3]", "[a]", "yes")
_BRACKETED = re.compile(r"\[[^\[\]\n]{1,20}\]")

# The replays of a game: the rule at stake, the random state of the process, whether another game takes turns.
_REPETITIONS = (("same seed", 1, False), ("global random", 2, False), ("two games", 1, True))

_LONG_GAME = 100
_SEEDS = 32
_PATIENCE_S = 10.0
_SLOW_STEP_S = 0.1
_SLOW_BUILD_S = 1.0


class Finding(NamedTuple):
    """A broken rule (a key of `RULES`), and the observation."""

    rule: str
    problem: str

    @property
    def is_note(self) -> bool:
        return self.rule in NOTES

    def __str__(self) -> str:
        return f"{self.rule}{' (note)' if self.is_note else ''}: {self.problem}; {RULES[self.rule]}"


def check_environment(env_id: str, params: Params) -> list[Finding]:
    """List the faults of an environment, at most one finding per rule.

    Raises:
        UserError: there is no such environment or parameter, or TextArena's game cannot be played here.
    """
    return _Check(env_id, params).run()


def write_trace(env_id: str, params: str, path: str) -> None:
    """Play one game in this process, a child of `check_environment`, and write its trace."""
    check = _Check(env_id, json.loads(params))
    trace: Trace = []
    problem = ""
    try:
        check.load()
        trace = check.trace(chance=3)
    except _Broken:
        problem = " and ".join(finding.problem for finding in check.findings.values())
    Path(path).write_text(json.dumps([trace, problem]))


Trace = list[tuple[str, str]]
"""The texts of a game, each with the name of the call that returned it."""


class _Broken(Exception):
    """Ends a part of the check, after the finding has been noted."""


class _Check:
    def __init__(self, env_id: str, params: Params) -> None:
        self.env_id = env_id
        self.params = params
        self.findings: dict[str, Finding] = {}
        self.times: dict[str, list[float]] = {"build": [], "step": []}

    def run(self) -> list[Finding]:
        threads, printed = set(threading.enumerate()), io.StringIO()
        with _global_chance(0), contextlib.redirect_stdout(printed):
            self.load()
            for part in (self.repetitions, self.odd_responses, self.long_game, self.solutions, self.maps):
                with contextlib.suppress(_Broken):
                    part()
        if text := printed.getvalue():
            self.found("stdout", f"the game printed {_short(text)}")
        self.threads(threads)
        self.speed()
        return [self.findings[rule] for rule in RULES if rule in self.findings]

    def found(self, rule: str, problem: str) -> None:
        self.findings.setdefault(rule, Finding(rule, problem))

    def fail(self, rule: str, problem: str) -> NoReturn:
        self.found(rule, problem)
        raise _Broken

    def call(self, rule: str, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the environment, and make any error a finding."""
        try:
            return function(*arguments)
        except (Exception, SystemExit) as error:
            self.found(rule, f"{what} raised {one_line(error)}")
            raise _Broken from error

    def load(self) -> None:
        """Build a game, so that all is imported. An error of the registry is the user's mistake and no finding."""
        try:
            make(self.env_id, 0, self.params)
        except UserError as error:
            if self.env_id not in registered() or error.__cause__ is None:
                raise
        except SystemExit:
            return

    def trace(self, *, chance: int, among_others: bool = False) -> Trace:
        """Record all texts of a game under a random state of the process, played alone or in turn with another game."""
        with _global_chance(chance):
            untouched = random.random(), np.random.uniform()
        with _global_chance(chance):
            game = _Game(self, 1)
            other = _Game(self, 2) if among_others else None
            instructions, map_hash, actions = game.attributes
            trace = [("instructions", instructions), ("map_hash", map_hash), ("actions", repr(actions))]
            trace.append(("reset()", game.reset()))
            if other:
                other.reset()
            for number, response in enumerate(game.likely_responses(20)):
                if other and not other.over:
                    other.step(response)
                step = game.step(response)
                trace.append((f"step {number}, {_short(response)}", repr(tuple(step))))
                if game.over:
                    break
            trace.append(("success()", repr(game.success())))
            if (random.random(), np.random.uniform()) != untouched:
                self.found("random state", "a game changed the random state of random or numpy.random")
        return trace

    def repetitions(self) -> None:
        first = self.trace(chance=1)
        for rule, chance, among_others in _REPETITIONS:
            if difference := _difference(first, self.trace(chance=chance, among_others=among_others)):
                self.fail(rule, difference)
        self.other_process(first)

    def other_process(self, first: Trace) -> None:
        hash_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
        variables = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        code = "import sys; from oel_ray.envs.check import write_trace; write_trace(*sys.argv[1:])"
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "trace.json"
            command = [sys.executable, "-c", code, self.env_id, json.dumps(self.params), str(out)]
            run = subprocess.run(
                command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
            if not out.exists():
                last = (run.stderr.strip().splitlines() or ["no message"])[-1]
                self.fail("other process", f"it ended with code {run.returncode}: {_short(last)}")
            trace, problem = json.loads(out.read_text())
        if difference := problem or _difference(first, [(name, text) for name, text in trace]):
            self.found("other process", difference)

    def odd_responses(self) -> None:
        game: _Game | None = None
        for response in ODD_RESPONSES * 2:
            if game is None or game.over:
                game = _Game(self, 3)
                game.reset()
            game.step(response)
            game.success()

    def long_game(self) -> None:
        game = _Game(self, 4)
        game.reset()
        for response in game.likely_responses(_LONG_GAME):
            step = game.step(response, "long game")
            if response in game.attributes[2] and not step.action:
                self.found("actions", f"no action was read from {_short(response)}, one of the game's own actions")
            if game.over:
                return

    def solutions(self) -> None:
        for seed in range(4):
            game = _Game(self, seed)
            solution = game.solution()
            if solution is None:
                return
            game.reset()
            for number, move in enumerate(solution, start=1):
                if game.step(move, "solution").done and number < len(solution):
                    self.fail("solution", f"the game of seed {seed} ended after {number} of {len(solution)} moves")
            if solution and not (game.over and game.success()):
                state = "was not won" if game.over else "went on"
                self.fail("solution", f"the game of seed {seed} {state} after {_short(solution)}")

    def maps(self) -> None:
        began = time.monotonic()
        looks: dict[str, tuple[str, str]] = {}
        for seed in range(_SEEDS):
            game = _Game(self, seed)
            instructions, map_hash, _ = game.attributes
            look = instructions, game.reset()
            if looks.setdefault(map_hash, look) != look:
                self.fail("map_hash", f"maps that look different have the same hash {map_hash}")
            if len(looks) > 1 and time.monotonic() - began > _PATIENCE_S:
                return
        if len(looks) == 1:
            self.found("maps", f"{_SEEDS} seeds drew one and the same map")

    def threads(self, before: set[threading.Thread]) -> None:
        gc.collect()
        started = [thread for thread in threading.enumerate() if thread not in before]
        deadline = time.monotonic() + 0.5
        for thread in started:
            thread.join(max(0.0, deadline - time.monotonic()))
        if left := [thread.name for thread in started if thread.is_alive()]:
            self.found("threads", f"{len(left)} threads are left behind: {', '.join(left[:3])}")

    def speed(self) -> None:
        for what, limit in (("step", _SLOW_STEP_S), ("build", _SLOW_BUILD_S)):
            times = self.times[what]
            if times and (median := statistics.median(times)) > limit:
                self.found("speed", f"a {what} took {median:.2f} s, the median of {len(times)}")


class _Game:
    """A game whose every call is timed and checked."""

    def __init__(self, check: _Check, seed: int) -> None:
        self.check = check
        self.over = False
        began = time.perf_counter()
        self.environment: Environment = check.call(
            "build", f"building the game of seed {seed}", make, check.env_id, seed, check.params
        )
        check.times["build"].append(time.perf_counter() - began)
        self.attributes = self._attributes()

    def reset(self) -> str:
        if self.success():
            self.check.found("success", "a game counts as won before reset()")
        text = self._call("reset", "reset")
        if not isinstance(text, str):
            self.check.fail("reset", f"reset() returned {_short(text)}")
        if self.success():
            self.check.found("success", "a game counts as won before its first step")
        self._still_the_same("reset()")
        return text

    def step(self, response: str, rule: str = "any text") -> Step:
        began = time.perf_counter()
        step = self._call(rule, "step", response)
        self.check.times["step"].append(time.perf_counter() - began)
        what = f"step({_short(response)})"
        if not (
            isinstance(step, Step)
            and _are_texts([step.action, step.feedback, step.outcome])
            and isinstance(step.done, bool)
        ):
            self.check.fail("step", f"{what} returned {_short(step)}")
        if step.done != bool(step.outcome):
            self.check.found("outcome", f"{what} has done={step.done} and outcome={_short(step.outcome)}")
        self._still_the_same(what)
        self.over = step.done
        return step

    def success(self) -> bool:
        won = self._call("success", "success")
        if not isinstance(won, bool):
            self.check.fail("success", f"success() returned {_short(won)}")
        return won

    def solution(self) -> list[str] | None:
        solution = self._call("solution", "solution")
        if solution is not None and not (isinstance(solution, list) and _are_texts(solution)):
            self.check.fail("solution", f"solution() returned {_short(solution)}")
        return solution

    def likely_responses(self, count: int) -> list[str]:
        """List plausible responses: the game's actions, or the bracketed words of its instructions."""
        instructions, _, actions = self.attributes
        choices = actions or [*_BRACKETED.findall(instructions), *_PLAIN_RESPONSES]
        return random.Random(5).choices(choices, k=count)

    def _call(self, rule: str, name: str, *arguments: str) -> Any:
        what = f"{name}({', '.join(map(_short, arguments))})"
        return self.check.call(rule, what, lambda: getattr(self.environment, name)(*arguments))

    def _attributes(self) -> tuple[str, str, list[str]]:
        """Read instructions, map hash and actions."""
        names = ("instructions", "map_hash", "actions")
        values = [self.check.call("attributes", f"reading {name}", getattr, self.environment, name) for name in names]
        for name, value in zip(names, values, strict=True):
            if not (_are_texts(value) if name == "actions" else isinstance(value, str) and value.strip()):
                self.check.fail("attributes", f"{name} is {_short(value)}")
        return values[0], values[1], list(values[2])

    def _still_the_same(self, what: str) -> None:
        if self._attributes() != self.attributes:
            self.check.fail("attributes", f"{what} changed instructions, map_hash or actions")


@contextlib.contextmanager
def _global_chance(seed: int) -> Iterator[None]:
    """Seed the process's random state inside the block, and restore it afterwards."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _are_texts(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(text, str) for text in value)


def _difference(first: Trace, second: Trace) -> str:
    """Describe the first difference between two traces; "" if they agree."""
    for (name, one), (again, other) in itertools.zip_longest(first, second, fillvalue=("the end", "")):
        if (name, one) != (again, other):
            equal = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
            start = max(0, equal - 10)
            return f"{name} gave {_short(one[start:])}, then {_short(other[start:])}"
    return ""


def _short(value: Any) -> str:
    """Shorten a `repr` to sixty characters. Works for objects whose `repr` raises, too."""
    form = reprlib.Repr()
    form.maxstring = form.maxother = 60
    return form.repr(value)
