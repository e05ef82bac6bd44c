"""Licences of dependencies: permissive, or named in docs/licences.md with the reason."""

import importlib.util
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from oel_ray.envs.textarena import single_player_ids

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/licences.md"
PERMISSIVE = re.compile(
    r"(the )?(apache|mit|[23]-clause bsd|bsd|isc|psfl?|python software foundation|unlicense|0bsd|cc0|bsl-1\.0|"
    r"cnri-python|academic free)\b",
    re.IGNORECASE,
)
NOT_PERMISSIVE = re.compile(r"GPL|General Public|MPL|Mozilla|CDDL|EUPL|proprietary", re.IGNORECASE)
NO_LICENCE = ("OSI Approved", "DFSG approved")


def pinned() -> set[str]:
    locks = [file.read_text() for file in (ROOT / "requirements").glob("*.lock")]
    return {canonicalize_name(name) for lock in locks for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}


def named() -> set[str]:
    return {canonicalize_name(name) for name in re.findall(r"^\| `([\w.-]+)` \|", PAGE.read_text(), re.MULTILINE)}


def declared(name: str) -> list[str]:
    """Every licence that the package declares, in its licence field and in its classifiers."""
    fields = metadata(name)
    text = (fields.get("License-Expression") or fields.get("License") or "").strip()
    classifiers = [line.split(" :: ")[-1] for line in fields.get_all("Classifier", []) if line.startswith("License ::")]
    kinds = [kind for kind in classifiers if kind not in NO_LICENCE]
    # Some packages paste the whole licence, whose first line may be its title.
    lines = text.splitlines()
    return [*(lines[:1] if len(lines) == 1 or not kinds else []), *kinds]


def is_permissive(licences: Sequence[str]) -> bool:
    parts = [part.strip("() ") for licence in licences for part in re.split(r"\s+(?:AND|OR)\s+", licence)]
    return bool(parts) and all(PERMISSIVE.match(part) and not NOT_PERMISSIVE.search(part) for part in parts)


def is_installed(name: str) -> bool:
    try:
        return bool(metadata(name))
    except PackageNotFoundError:
        return False


def test_every_pinned_package_is_permissive_or_named_with_the_reason() -> None:
    installed = set(filter(is_installed, pinned()))
    licences = {name: declared(name) for name in installed}
    others = {name: said for name, said in licences.items() if not is_permissive(said)}
    assert {name: said for name, said in others.items() if name not in named()} == {}
    assert named() & installed - others.keys() == set(), "these need no row any more"
    assert named() - pinned() == set(), "these are no dependency any more"


@pytest.mark.parametrize(
    ("licences", "permissive"),
    [
        (["MIT"], True),
        (["Apache-2.0 WITH LLVM-exception AND BSD-3-Clause"], True),
        (["BSD", "BSD License"], True),
        (["MPL-2.0 AND (Apache-2.0 OR MIT)"], False),
        (["MIT", "GNU General Public License v3 or later (GPLv3+)"], False),
        (["BUSL-1.1"], False),
        ([], False),
    ],
)
def test_a_licence_counts_as_permissive_only_if_all_its_parts_do(licences: list[str], permissive: bool) -> None:
    assert is_permissive(licences) is permissive


def test_the_image_has_no_chess_and_no_game_of_one_player_needs_it() -> None:
    spec = importlib.util.find_spec("textarena")
    assert spec and spec.origin
    games = Path(spec.origin).parent
    imports = re.compile(r"^\s*(?:from|import)\b.*\bchess\b", re.MULTILINE)
    needing = {file.parent.relative_to(games) for file in games.rglob("*.py") if imports.search(file.read_text())}
    assert needing == {Path("envs/Chess")}
    assert [name for name in single_player_ids() if "chess" in name.lower()] == []
    assert "sed -i '/^chess==/d' /tmp/gpu.lock && " in (ROOT / "cluster/Dockerfile").read_text()
