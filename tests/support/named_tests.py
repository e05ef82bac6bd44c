"""The tests that docs/faults.md names."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/faults.md"


def named_tests(text: str | None = None) -> list[tuple[str, str]]:
    """File and name of each, in the whole page or in a part of it."""
    return re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", PAGE.read_text() if text is None else text)
