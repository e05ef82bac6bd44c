"""The run folders, unpacked once."""

import tarfile
from pathlib import Path

import pytest

from tests.compat.make_runs import ARCHIVE


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all of them, to be copied and not to be changed."""
    folder = tmp_path_factory.mktemp("compat")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    return folder
