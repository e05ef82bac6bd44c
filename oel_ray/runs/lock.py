"""The lock of a run folder: one driver process at a time, on local disks and NFS. Runs in the driver.

A file made with O_EXCL says who holds the folder, and a thread touches it as a heartbeat. No flock: it is unreliable
on NFS and says nothing about the holder.
"""

import contextlib
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
from pydantic import ValidationError

from oel_ray.errors import RunFailed, UserError
from oel_ray.records import Record
from oel_ray.runs.files import now

LOCK_FILE = "lock.json"
TAKEOVER_FILE = "lock.takeover"
HEARTBEAT_S = 5.0
STALE_S = 60.0
TAKEOVER_WAIT_S = 10.0


class Holder(Record):
    token: str
    host: str
    pid: int
    command: str
    started: str


class FolderLock:
    """Held from `acquire` to `release`."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self._path = path
        self._holder = holder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-folder-heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, folder: Path) -> "FolderLock":
        """Take the lock, from a dead holder if need be.

        Raises:
            UserError: another process holds it; the message says which.
        """
        path = folder / LOCK_FILE
        me = Holder(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            command=shlex.join(sys.argv),
            started=now(),
        )
        if not _create(path, me):
            _take_over(path, me)
        return cls(path, me)

    def check(self) -> None:
        """Called before anything is committed: a driver that was suspended may have lost the folder meanwhile.

        Raises:
            RunFailed: the lock is no longer ours.
        """
        if not self._ours():
            raise RunFailed(f"the lock of the run folder was lost: {_describe(self._path)}")

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._ours():
            self._path.unlink()

    def _ours(self) -> bool:
        holder = _read(self._path)
        return holder is not None and holder.token == self._holder.token

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):  # a file server that does not answer now may answer the next beat
                if self._ours():
                    os.utime(self._path)


def _create(path: Path, holder: Holder) -> bool:
    try:
        with path.open("xb") as file:
            file.write(holder.to_json() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _take_over(path: Path, me: Holder) -> None:
    """Replace a stale lock. The takeover file admits one process at a time and then becomes the lock itself."""
    takeover = path.with_name(TAKEOVER_FILE)
    deadline = time.monotonic() + TAKEOVER_WAIT_S
    while not _create(takeover, me):
        if time.monotonic() > deadline:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - takeover.stat().st_mtime > STALE_S:
                    takeover.unlink()  # left by a process that died in these few lines
            raise UserError(f"{_describe(path)}; another process is looking at its lock: try again")
        time.sleep(0.05)
    try:
        holder = _read(path)
        try:
            # Both times were set by the file system that holds the folder, so clocks that differ do no harm.
            age = takeover.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            if _create(path, me):
                return
            age = 0.0
        if age <= STALE_S and not (holder and _is_dead(holder)):
            raise UserError(f"{_describe(path)}: wait for it to end, or choose another folder")
        takeover.replace(path)
    finally:
        takeover.unlink(missing_ok=True)


def _is_dead(holder: Holder) -> bool:
    return holder.host == socket.gethostname() and not psutil.pid_exists(holder.pid)


def _read(path: Path) -> Holder | None:
    try:
        return Holder.from_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):  # ValidationError: another process is just writing it
        return None


def _describe(path: Path) -> str:
    holder = _read(path)
    if holder is None:
        return f"{path.parent} is in use by a process that is just starting"
    return f"{path.parent} is in use by process {holder.pid} on {holder.host} since {holder.started} ({holder.command})"
