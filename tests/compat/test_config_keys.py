"""The keys of a configuration, their defaults and choices, and the presets."""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from tests.compat.frozen import differences, flat
from tests.compat.places import RunConfig, load_config, preset_names, read_source


def parts(annotation: Any) -> Iterator[Any]:
    """An annotation, and all that stands inside it."""
    yield annotation
    for part in () if get_origin(annotation) is Literal else get_args(annotation):
        yield from parts(part)


def keys(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, list[str]]]:
    """Each key of a section and of those in it, with its default and the words that it takes."""
    for name, field in type(section).model_fields.items():
        value, inside = getattr(section, name), list(parts(field.annotation))
        if not isinstance(value, BaseModel):
            words = [str(word) for part in inside if get_origin(part) is Literal for word in get_args(part)]
            yield prefix + name, section.model_dump(mode="json")[name], words
        for kind in inside:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys(value if isinstance(value, kind) else kind(), f"{prefix}{name}.")


def test_no_configuration_key_vanishes_or_changes_its_default() -> None:
    assert differences("config_keys.yaml", {key: default for key, default, _ in keys(RunConfig())}) == []


def test_no_configuration_key_takes_other_words_than_it_did() -> None:
    assert differences("config_choices.yaml", {key: words for key, _, words in keys(RunConfig()) if words}) == []


def test_the_keys_are_all_that_a_saved_configuration_has() -> None:
    saved = set(flat(RunConfig().model_dump(mode="json")))
    assert {key for key, _, _ in keys(RunConfig())} >= saved


def test_the_presets_and_their_switches_say_what_they_said() -> None:
    """A preset is what it changes of the defaults, a switch what that changes of the preset."""

    def changes(below: RunConfig, above: RunConfig) -> dict[str, Any]:
        before, after = flat(below.model_dump(mode="json")), flat(above.model_dump(mode="json"))
        return {key: value for key, value in after.items() if key not in before or before[key] != value}

    now: dict[str, Any] = {}
    for name in preset_names():
        preset = load_config(name)
        now[name] = changes(RunConfig(), preset)
        for switch in read_source(name).switches:
            now[f"{name} {switch}=true"] = changes(preset, load_config(name, [f"{switch}=true"]))
    assert differences("presets.yaml", now) == []
