"""What of a configuration may change while a run exists. Runs in the driver."""

from typing import Any

FIXED = ("model:", "thinking:", "seed:", "env.id:", "env.params.", "env.split:", "env.min_solution:")
"""Settings that may not change once a stage is committed, because results made under both values would look alike."""


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """List the keys whose values differ, each with both values."""
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in keys]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Write nested values under dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result
