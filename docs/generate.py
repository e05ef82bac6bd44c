"""Writes docs/configuration.md from the configuration's own types and docstrings: `python docs/generate.py`."""

import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from oel_ray.config.load import preset_names, read_source
from oel_ray.config.schema import RunConfig, SamplingConfig

TARGET = Path(__file__).with_name("configuration.md")

INTRODUCTION = """\
# Configuration

<!-- Written by docs/generate.py from oel_ray/config/schema.py. -->

A configuration is a YAML file, or one of the presets that come with the package:

```bash
.venv/bin/oel config frozenlake-qwen3-1.7b                       # a preset, resolved, with what it amounts to
.venv/bin/oel config mine.yaml rounds=3 collect.sampling.top_k=5 # a file, two values changed
```

A file holds what differs from the defaults below. It may start from another file or a preset, and may offer switches,
named sets of changes that are off until somebody says `name=true`:

```yaml
base: frozenlake-qwen3-1.7b
model: /models/mine
consolidate: {steps: 40}
switches:
  quick: {rounds: 1, evaluate: {maps: 16}}
```

`oel run mine.yaml quick=true rounds=2` takes the base, then the file, then the switches that are on, then the values on
the command line. An unknown key is an error that names the nearest known one.

"""


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section with the dotted prefix of its keys, from the top level down."""
    yield prefix, model
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if is_section(kind):
                yield from sections(kind, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key holds in any case; one that may be null counts as a value."""
    return field.annotation if is_section(field.annotation) else None


def is_section(kind: Any) -> typing.TypeGuard[type[BaseModel]]:
    """The sampling sections are described once and count as values."""
    return isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not SamplingConfig


def type_name(field: FieldInfo) -> str:
    """What may be written: `integer >= 1`, `"a" or "b"`."""
    limits = []
    for rule in field.metadata:
        for sign, name in ((">", "gt"), (">=", "ge"), ("<", "lt"), ("<=", "le")):
            if isinstance(rule, annotated_types.BaseMetadata) and getattr(rule, name, None) is not None:
                limits.append(f"{sign} {getattr(rule, name):g}")
    return " ".join([plain_type(field.annotation), " and ".join(limits)]).strip()


def plain_type(kind: Any) -> str:
    names = {int: "integer", float: "number", str: "text", bool: "true or false", NoneType: "null"}
    if kind in names:
        return names[kind]
    if kind is SamplingConfig or is_section(kind):
        return "[sampling](#sampling)" if kind is SamplingConfig else "a section, below,"
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if typing.get_origin(kind) in (typing.Union, UnionType):
        return " or ".join(plain_type(argument) for argument in arguments)
    if typing.get_origin(kind) in (typing.Annotated, tuple):
        one = plain_type(arguments[0])
        several = one.replace(" or ", ", ") if "`" in one else f"{one}s"
        return f"list of {several}" if typing.get_origin(kind) is tuple else one
    return "name: value pairs"


def default_of(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        changed = ", ".join(f"{key}: {item}" for key, item in value.model_dump(exclude_defaults=True).items())
        return f"`{{{changed}}}`" if changed else "as below"
    if isinstance(value, bool) or value is None:
        return f"`{str(value).lower()}`" if value is not None else "`null`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def table(model: type[BaseModel], prefix: str = "") -> str:
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if not section_of(field):
            text = " ".join((field.description or "").split())
            rows.append(f"| `{prefix}{name}` | {type_name(field)} | {default_of(field)} | {text} |")
    return "\n".join(rows) + "\n"


def presets() -> str:
    rows = ["| preset | starts from | switches |", "|---|---|---|"]
    for name in preset_names():
        source = read_source(name)
        rows.append(f"| `{name}` | {f'`{source.base}`' if source.base else ''} | {', '.join(source.switches)} |")
    return "\n".join(rows) + "\n"


def reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Presets\n\n", presets()]
    for prefix, model in sections(RunConfig):
        parts += [f"\n## {prefix.rstrip('.') or 'Top level'}\n\n", table(model, prefix)]
    parts += ["\n## sampling\n\nHow responses are sampled, wherever a key above takes it.\n\n", table(SamplingConfig)]
    return "".join(parts)


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
