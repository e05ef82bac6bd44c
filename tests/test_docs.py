"""The documentation says what the code says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from oel_ray.config import RunConfig, SamplingConfig

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_reference_is_up_to_date(generate: ModuleType) -> None:
    assert (DOCS / "configuration.md").read_text() == generate.reference(), "run: python docs/generate.py"


def test_every_key_is_described(generate: ModuleType) -> None:
    keys = [
        f"{prefix}{name}"
        for prefix, section in [*generate.sections(RunConfig), ("sampling.", SamplingConfig)]
        for name, field in section.model_fields.items()
        if not generate.section_of(field) and not field.description
    ]
    assert keys == []
