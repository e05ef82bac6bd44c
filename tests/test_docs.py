"""The documentation says what the code says."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from oel_ray.config import RunConfig, SamplingConfig
from tests.named_tests import PAGE, named_tests

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


def test_every_fault_has_tests_that_exist_or_a_reason() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if re.match(r"\| \d", line)]
    assert [int(line.split("|")[1]) for line in rows] == list(range(1, 36))
    assert [line for line in rows if not named_tests(line) and "not shown" not in line] == []
    lacking = [
        f"{file}::{name}" for file, name in named_tests() if f"def {name}(" not in (PAGE.parents[1] / file).read_text()
    ]
    assert lacking == []
