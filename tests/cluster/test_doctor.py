"""What `oel doctor` finds on a machine, and what it makes of what nodes say."""

import http.server
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from oel_ray.cluster import doctor, session, submit
from oel_ray.cluster.doctor import Finding, examine, is_open, look, versions
from oel_ray.config.load import load_config
from oel_ray.config.schema import RunConfig

CONFIG = load_config("quickstart")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(session, "gpu_memory", list)


def errors(found: list[Finding]) -> str:
    return "\n".join(what for _, what, is_error in found if is_error)


def here_is(folder: Path, config: RunConfig = CONFIG, gpus: float | None = None, **others: str) -> list[Finding]:
    return look(config, folder, "node", others, gpus)


def test_a_sound_machine_has_no_errors_and_nothing_is_left_on_it(tmp_path: Path) -> None:
    assert errors(examine(CONFIG, tmp_path / "runs" / "new", print)) == ""
    assert list(tmp_path.iterdir()) == []


def test_too_few_gpus_are_found_without_a_cluster(tmp_path: Path) -> None:
    config = load_config("quickstart", ["engines.device=cuda"])
    assert "needs 4 GPUs and this machine has" in errors(examine(config, tmp_path, print))


def test_a_folder_that_is_not_shared_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert here_is(tmp_path / "elsewhere") == here_is(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["node"]
    monkeypatch.setattr(doctor, "look", lambda *_: [])
    assert errors(examine(CONFIG, tmp_path / "runs", print)).startswith(
        f"what it writes to {tmp_path} is not seen here"
    )


def test_a_model_that_is_not_there_is_found(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"model": str(tmp_path / "absent")})
    assert "absent does not exist" in errors(here_is(tmp_path, config))


def test_a_teacher_that_is_not_there_is_found(tmp_path: Path) -> None:
    config = load_config("quickstart", [f"consolidate.teacher={tmp_path / 'absent'}"])
    assert "absent does not exist" in errors(here_is(tmp_path, config))


def test_a_package_that_is_too_large_to_be_submitted_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("base: quickstart")
    assert doctor.package(str(tmp_path / "mine.yaml")) == doctor.package("quickstart") == []
    monkeypatch.setattr(submit, "LARGEST_PACKAGE", 1)
    ((where, what, is_error),) = doctor.package(str(tmp_path / "mine.yaml"))
    assert (where, is_error) == ("here", False) and "mine.yaml (0.0 MiB)" in what
    assert doctor.package("quickstart") == []


def test_gpus_that_ray_counts_and_the_driver_does_not_see_are_found(tmp_path: Path) -> None:
    assert errors(here_is(tmp_path, gpus=0.0)) == ""
    assert "has 0 GPUs and Ray counts 2.0" in errors(here_is(tmp_path, gpus=2.0))


def test_settings_that_may_do_harm_are_notes_and_no_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30 - 1, 1))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1024))
    found = here_is(tmp_path)
    assert not any(finding.is_error for finding in found)
    said = "\n".join(finding.what for finding in found)
    for part in ("CUDA_VISIBLE_DEVICES=1: unset it", "0.00 GiB of disk", "of /dev/shm", "1024 files at most: ulimit"):
        assert part in said


def test_package_versions_that_differ_from_the_drivers_are_found(tmp_path: Path) -> None:
    assert errors(here_is(tmp_path, **versions())) == ""
    said = errors(here_is(tmp_path, **versions() | {"ray": "2.59.0"}))
    assert f"has ray {versions()['ray']} (driver: 2.59.0): install the same everywhere" in said


@pytest.fixture
def dashboard(request: pytest.FixtureRequest) -> Iterator[str]:
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("0.0.0.0", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"0.0.0.0:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(("dashboard", "is_it"), [(200, True), (401, False)], indirect=["dashboard"])
def test_a_dashboard_that_asks_for_no_token_is_open_unless_it_is_for_this_machine(dashboard: str, is_it: bool) -> None:
    assert is_open(dashboard) == is_it
    assert not is_open(dashboard.replace("0.0.0.0", "127.0.0.1"))
    assert not is_open("") and not is_open("0.0.0.0:1")
