"""The documentation says what the code says."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from ray.dashboard.modules.job.cli import submit as ray_job_submit

from oel_ray.cluster.submit import plan_job
from oel_ray.config.schema import RunConfig, SamplingConfig
from tests.support.named_tests import PAGE, named_tests

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    named = named_tests(page.read_text())
    assert [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()] == []


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = page.read_text()
        titles = re.findall(r"^#+ (.*)$", text.lower(), re.MULTILINE)
        heads = {re.sub(r"[^a-z0-9 -]", "", title).replace(" ", "-") for title in titles}
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, head = target.partition("#")
            assert file.startswith("https://") or (page.parent / file).exists(), f"{page.name}: {target}"
            assert file or head in heads, f"{page.name}: {target}"


def test_the_cluster_guide_names_its_files() -> None:
    named = set(re.findall(r"`(cluster/[\w.-]+)`", (DOCS / "cluster.md").read_text()))
    files = {f"cluster/{path.name}" for path in (ROOT / "cluster").iterdir() if path.is_file()}
    assert named == files - {"cluster/Dockerfile.dockerignore"}


def test_the_ray_job_submit_line_in_the_guide_asks_for_the_same_as_oel_submit() -> None:
    guide = (DOCS / "cluster.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ray job submit (--submission-id .*)$", guide, re.MULTILINE)
    submitted = ray_job_submit.make_context("submit", shlex.split(line)).params
    job = plan_job("first", "frozenlake-qwen3-1.7b", [], Path("/mnt/oel/runs"), {})
    assert shlex.join(submitted["entrypoint"]) == job.entrypoint
    assert submitted["submission_id"] == "oel-first-1"
    assert submitted["runtime_env"] == "cluster/runtime_env.yaml"


@pytest.mark.parametrize("page", [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("design/*.md")])
def test_every_file_that_a_page_about_the_code_names_exists(page: Path) -> None:
    named = re.findall(r"`((?:oel_ray|docs|cluster|examples|tests)/[^`\s:]*)", page.read_text())
    assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_the_architecture_can_be_read_in_minutes_and_a_design_page_answers_one_question() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().split()) <= 1300
    sizes = {page.stem: len(page.read_text().split()) for page in DOCS.glob("design/*.md")}
    assert len(sizes) >= 8 and {name: size for name, size in sizes.items() if not 400 <= size <= 800} == {}
