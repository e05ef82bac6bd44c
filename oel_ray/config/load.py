"""Build a configuration from a preset or YAML file, switches and overrides. Runs in the driver; imports nothing heavy.

A file may start from another one (`base`), and offer named sets of changes (`switches`):

    base: frozenlake-qwen3-1.7b
    model: /models/mine
    switches:
      quick: {rounds: 1}

`oel run mine.yaml quick=true rounds=2` applies the base, the file, the active switches and the overrides, in this
order.
"""

import difflib
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ValidationError

from oel_ray.config.schema import RunConfig
from oel_ray.errors import UserError

Values = dict[str, Any]
_PRESETS = Path(__file__).parent / "presets"


class Source(NamedTuple):
    """The content of a preset or file, with its bases merged in."""

    values: Values
    switches: dict[str, Values]
    base: str | None = None


def preset_names() -> list[str]:
    return sorted(file.stem for file in _PRESETS.glob("*.yaml"))


def load_config(source: str, overrides: list[str] | None = None) -> RunConfig:
    """Load the configuration of a preset or a YAML file, and apply `key=value` overrides (dotted keys).

    Raises:
        UserError: unknown preset, unreadable file, unknown key, or a value of the wrong type.
    """
    values, switches, _ = read_source(source)
    changes = [parse_override(override) for override in overrides or []]
    for key, value in changes:
        if key in switches:
            if not isinstance(value, bool):
                raise UserError(f"'{key}' is a switch of {source}: write {key}=true or {key}=false (got {value!r})")
            values = _merged(values, switches[key] if value else {}, RunConfig)
    for key, value in changes:
        if key not in switches:
            _set_dotted(values, key, value)
    return parse_config(values, switches)


def parse_config(values: Values, switches: dict[str, Values] | None = None) -> RunConfig:
    """Validate plain values; `switches` are further names to suggest for an unknown key.

    Raises:
        UserError: with the dotted key at fault, and the nearest known key for an unknown one.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, [*(switches or {})])) from None


def parse_override(override: str) -> tuple[str, Any]:
    """Split `key=value`, and read the value as YAML.

    Raises:
        UserError: the override has another form.
    """
    key, sign, text = override.partition("=")
    if not sign:
        raise UserError(f"'{override}' is not an override: write key=value, e.g. rounds=3")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"the value in '{override}' is not valid YAML: write it as in a YAML file") from None


def read_source(source: str, relative_to: Path | None = None, seen: tuple[str, ...] = ()) -> Source:
    """Read a preset or a file, and merge in its bases.

    A file named as a base is looked for beside the file that names it.

    Raises:
        UserError: there is no such preset or file, it is no YAML of keys and values, or it is based on itself.
    """
    path = (relative_to or Path()) / source
    if source in preset_names():
        text, identity = _text(_PRESETS / f"{source}.yaml"), source
    elif path.is_file():
        text, identity = _text(path), str(path.resolve())
    else:
        raise UserError(f"'{source}' is neither a YAML file nor a preset: presets are {', '.join(preset_names())}")
    if identity in seen:
        raise UserError(f"{source} is based on itself: {' -> '.join([*seen, identity])}")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{source} holds no key: value pairs")
    base, switches = values.pop("base", None), values.pop("switches", None) or {}
    if not isinstance(switches, dict) or not all(isinstance(changes, dict) for changes in switches.values()):
        raise UserError(f"{source}: 'switches' must hold names with the keys that each of them changes")
    if base is None:
        return Source(values, switches)
    below = read_source(str(base), path.parent, (*seen, identity))
    return Source(_merged(below.values, values, RunConfig), below.switches | switches, str(base))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def _merged(below: Values, above: Values, model: type[BaseModel]) -> Values:
    """Merge `above` over `below`, section by section. Values that are no sections, such as parameters, are replaced."""
    result = dict(below)
    for key, value in above.items():
        section = _section(model, key)
        if section and isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merged(result[key], value, section)
        else:
            result[key] = value
    return result


def _set_dotted(values: Values, key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        child = values.get(parent)
        if child is not None and not isinstance(child, dict):
            raise UserError(f"'{key}': {parent} is a value, not a section")
        values[parent] = dict(child or {})  # the loaded values may be shared with a switch
        values = values[parent]
    values[leaf] = value


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """Return the model of a section, None for a plain value."""
    field = model.model_fields.get(key)
    kinds = [field.annotation, *get_args(field.annotation)] if field else []
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name in model.model_fields:
        keys.append(prefix + name)
        if section := _section(model, name):
            keys += _known_keys(section, f"{prefix}{name}.")
    return keys


def _explain(error: ValidationError, switches: list[str]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = [*_known_keys(RunConfig), *switches]
        leaf = key.rpartition(".")[2]
        same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
        near = same_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        return f"unknown configuration key '{key}'" + (f": did you mean '{near[0]}'?" if near else "")
    if key.startswith("env.params."):  # pydantic would name only the first of the allowed types
        return (
            f"env.params: '{first['loc'][2]}' has no value that an environment takes (got {first['input']!r}): "
            "write e.g. 'env.params={size: 4}'"
        )
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (got {first['input']!r})" if key else message
