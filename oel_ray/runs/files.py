"""Files that survive a crash: written aside, forced to disk, then renamed. The driver process."""

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from oel_ray.errors import UserError
from oel_ray.records import Record


class FileEntry(Record):
    bytes: int
    sha256: str


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, so that a reader sees the old file or the new one."""
    write_atomically(path, orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        UserError: it is damaged.
    """
    try:
        value: dict[str, Any] = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: {error}: put back what was there") from None
    return value


def write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_below(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path]


def fingerprint(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(bytes=file.tell(), sha256=digest)


def seal(path: Path) -> FileEntry:
    """Force a file to disk; returns its fingerprint."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return fingerprint(path)


_READ = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors", ".bin"}
_SMALL_BYTES = 2**26


def model_files(folder: Path) -> dict[str, str]:
    """What tells a model folder from a changed one: the content of its small files, the sizes of its weights."""
    sizes = {file: file.stat().st_size for file in sorted(folder.iterdir()) if file.suffix in _READ}
    return {
        file.name: fingerprint(file).sha256[:16] if size < _SMALL_BYTES else f"{size} bytes"
        for file, size in sizes.items()
    }


def now() -> str:
    """Write the time of day in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
