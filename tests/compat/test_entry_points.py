"""What users and other programs call by name: commands, entry points, the environments' side, files to import."""

import ast
import inspect
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from typer.main import get_command

from tests.compat.frozen import DATA, differences
from tests.compat.places import app, envs

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUP = "oel_ray.environments"
IMPORTS = re.compile(r"^\s*(?:from (oel_ray[\w.]*) import (.+)|import (oel_ray[\w.]*).*)$", re.MULTILINE)
"""Of the package, as a user's code or a line in a document has them."""


def load(value: str) -> Any:
    """What an entry point names."""
    module, _, name = value.partition(":")
    return getattr(import_module(module), name)


def test_the_names_that_pip_and_entry_points_know_are_there() -> None:
    assert PROJECT["name"] == "oel-ray"
    assert {*PROJECT["optional-dependencies"]} >= {"gpu", "lora", "metrics", "wandb", "cpu"}
    assert callable(load(PROJECT["scripts"]["oel"]))
    assert callable(load(PROJECT["entry-points"]["vllm.general_plugins"]["oel_ray_weight_transfer"]))


@pytest.mark.process
@pytest.mark.parametrize("command", [["-m", "oel_ray"], ["-c", "from {} import {main}; {main}()"]])
def test_the_console_script_and_the_module_are_the_command_line(command: list[str]) -> None:
    module, _, main = PROJECT["scripts"]["oel"].partition(":")
    line = [sys.executable, command[0], command[1].format(module, main=main), "--help"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout and "check-env" in done.stdout


def commands() -> dict[str, Any]:
    """Every command with its arguments in order, and its options with their defaults."""
    found: dict[str, Any] = {}
    tree: Any = get_command(app)
    for name, command in tree.commands.items():
        arguments, options = [], dict[str, Any]()
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                text = f"{parameter.metavar}{'...' if parameter.nargs == -1 else ''}"
                arguments.append(text if parameter.required else f"[{text}]")
            else:
                times = "..." if parameter.multiple else f" {parameter.metavar}" if parameter.nargs > 1 else ""
                option = "/".join([*parameter.opts, *parameter.secondary_opts]) + times
                options[option] = "required" if parameter.required else parameter.default
                if variables := parameter.envvar:
                    options[f"{option} from"] = [variables] if isinstance(variables, str) else [*variables]
        options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
        found[name] = {"arguments": " ".join(arguments), "options": options}
    return found


def test_no_command_or_option_vanishes_or_changes_its_default() -> None:
    assert differences("commands.yaml", commands()) == []


def test_environments_are_written_against_the_names_that_they_were() -> None:
    assert {*envs.__all__} >= {"Environment", "Step", "make"}
    assert str(inspect.signature(envs.make)).startswith("(env_id: str, seed: int, params: ")
    assert envs.Step._fields == ("action", "feedback", "done", "outcome")
    assert envs.Step._field_defaults == {}
    assert envs.Step("a", "b", True, "c") == ("a", "b", True, "c")


def test_an_environment_is_asked_for_what_it_was_asked_for() -> None:
    """More that it must have, or more that it is given, would break what users have written."""
    protocol: Any = envs.Environment
    assert set(inspect.get_annotations(protocol)) == {"instructions", "map_hash", "actions"}
    methods = {name: value for name, value in vars(protocol).items() if inspect.isfunction(value) and name[0] != "_"}
    assert {name: [*inspect.signature(method).parameters] for name, method in methods.items()} == {
        "reset": ["self"],
        "step": ["self", "response"],
        "success": ["self"],
        "solution": ["self"],
    }
    returned = {name: get_type_hints(method)["return"] for name, method in methods.items()}
    assert returned == {"reset": str, "step": envs.Step, "success": bool, "solution": list[str] | None}


@pytest.mark.process
def test_an_environment_of_before_is_found_by_its_entry_point_and_keeps_the_rules(tmp_path: Path) -> None:
    """As installed: its package's metadata and its module are on the path, and nothing of it is in this repository."""
    info = tmp_path / "doors-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: doors\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nDoors-v1 = doors:Doors\n")
    (tmp_path / "doors.py").write_bytes((DATA / "doors.py").read_bytes())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}
    command = [sys.executable, "-m", "oel_ray", "check-env", "Doors-v1", "doors=2"]
    checked = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "Doors-v1 can be played" in checked.stdout


def told_imports() -> set[tuple[str, str]]:
    """What documents, and the code that users are told to copy, import of the package."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*/README.md")]
    files += (ROOT / "examples" / "custom_environment").glob("*.py")
    found = [match for file in files for match in IMPORTS.findall(file.read_text())]
    return {(module or bare, name.strip()) for module, names, bare in found for name in (names or "*").split(",")}


def test_users_are_told_to_import_environments_alone() -> None:
    """Modules elsewhere may move. Whoever tells of another import freezes it here."""
    assert told_imports() == {("oel_ray.envs", "Step")}
    source = ast.parse((DATA / "doors.py").read_text())
    assert [node.module for node in ast.walk(source) if isinstance(node, ast.ImportFrom)][-1] == "oel_ray.envs"
