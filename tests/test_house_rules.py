"""Rules of this repository that no linter has."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "oel_ray").rglob("*.py"))
READY = "# ready"
"""Marks a `ray.get` of a reference that `ray.wait` has returned."""
UNPICKLES = re.compile(
    r"\b(cloudpickle|pickle|torch)\.loads?\(|from (cloudpickle|pickle) import|from torch import .*load"
)
REGISTRIES = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.(org|com)|npmjs\.(org|com)|crates\.io|golang\.org"
)


def lines_of_code(file: Path) -> int:
    """Lines with code on them: no comment, no docstring, nothing blank."""
    source = file.read_text()
    texts = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in texts for n, line in lines)


def endless_gets(source: str) -> Iterator[int]:
    """Lines with a `ray.get` that may wait for ever."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.get":
            bounded = any(keyword.arg == "timeout" for keyword in node.keywords)
            if not bounded and READY not in lines[node.lineno - 1]:
                yield node.lineno


def test_the_package_stays_small() -> None:
    sizes = {file.relative_to(ROOT).as_posix(): lines_of_code(file) for file in FILES}
    assert {name: size for name, size in sizes.items() if size > 500} == {}
    assert sizes["oel_ray/loop.py"] < 200
    assert sum(sizes.values()) < 8530


def test_the_server_side_reads_experience_and_knows_no_game() -> None:
    rooms = {"extract", "consolidate", "distill", "engines", "weights"}
    games = re.compile(r"\b(Trajectory|Episode|EvaluationGame)\b")
    files = [file for file in FILES if rooms & set(file.parts)]
    assert len(files) > 20 and [file.name for file in files if games.search(file.read_text())] == []


def test_few_modules_stand_outside_of_the_rooms() -> None:
    assert len([file for file in FILES if file.parent == ROOT / "oel_ray"]) <= 12


def test_every_ray_get_has_a_deadline() -> None:
    found = {f"{file.relative_to(ROOT)}:{line}" for file in FILES for line in endless_gets(file.read_text())}
    assert found == set()


@pytest.mark.parametrize(
    ("call", "endless"),
    [
        ("ray.get(x)", True),
        ("ray.get(\n    x,\n)", True),
        ("ray.get(x, timeout=1)", False),
        ("ray.get(x)  # ready", False),
        ("cache.get(x)", False),
    ],
)
def test_the_check_for_deadlines_finds_endless_gets_only(call: str, endless: bool) -> None:
    assert list(endless_gets(f"y = {call}\n")) == [1] * endless


def test_no_code_of_the_package_unpickles_data() -> None:
    assert [file.name for file in FILES if UNPICKLES.search(file.read_text())] == []


def test_no_code_that_comes_with_a_model_is_run() -> None:
    assert [file.name for file in FILES if re.search(r"trust_remote_code\W+True", file.read_text())] == []


def test_no_package_registry_is_named() -> None:
    """Where packages come from is the affair of whoever installs: pip's configuration, or `make TORCH_INDEX=...`."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    texts = {file: file.read_text(errors="replace") for file in files if file.is_file() and file != Path(__file__)}
    assert [str(file) for file, text in texts.items() if REGISTRIES.search(text)] == []
