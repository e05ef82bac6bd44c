"""What is written down in `data/`, and how the code of today is held against it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).parent / "data"


def frozen(name: str) -> Any:
    """Read a YAML file of `data/`."""
    return yaml.safe_load((DATA / name).read_text(encoding="utf-8"))


def differences(name: str, now: Mapping[str, Any]) -> list[str]:
    """Say how something differs from what a YAML file of `data/` has; [] if it does not."""
    return list(_differences(name, flat(frozen(name)), flat(now)))


def _differences(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in {**before, **now}:
        if key not in now:
            yield f"{key} is gone, and users have it: bring it back"
        elif key not in before:
            yield f"{key} is new: add it to tests/compat/data/{name} (now {now[key]!r})"
        elif before[key] != now[key]:
            yield f"{key} was {before[key]!r} and is {now[key]!r}: users rely on what it was"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys in place of sections."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return result
