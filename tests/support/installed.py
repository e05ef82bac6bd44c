"""Environments as if installed: entry points that this process and its children find, and nothing is installed."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from oel_ray.envs.registry import GROUP, registered


@contextmanager
def installed(folder: Path, environments: Mapping[str, str], *code: Path) -> Iterator[None]:
    """`environments` from name to "module:factory"; `folder` takes metadata, `code` are folders with the modules."""
    info = folder / "games_for_tests-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: games-for-tests\nVersion: 1.0\n")
    lines = [f"{name} = {factory}" for name, factory in environments.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
    with pytest.MonkeyPatch.context() as patch:
        for path in (folder, *code):
            patch.syspath_prepend(path)
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (*code, folder, Path(__file__).parents[2]))))
        registered.cache_clear()
        yield
    registered.cache_clear()
