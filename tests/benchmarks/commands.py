"""Benchmarks as a person runs them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A module of the benchmarks, where neither Ray nor vLLM nor what else is named can be imported."""
    missing = dict.fromkeys(("ray", "vllm", *without))
    code = f"import runpy, sys; sys.modules.update({missing}); sys.argv = sys.argv[1:]; "
    code += "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    argv = [sys.executable, "-c", code, *command]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def options(values: dict[str, int]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def last_line(*command: str) -> dict[str, Any]:
    done = run(*command)
    assert done.returncode == 0, done.stderr
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


def check(line: dict[str, Any], name: str, goal: str, above: str, below: str) -> None:
    assert (line["name"], line["goal"]) == (name, goal)
    assert line["ratio"] == pytest.approx(line[above] / line[below], rel=0.1)
    assert line["spread"][0] <= line["ratio"] <= line["spread"][1]
