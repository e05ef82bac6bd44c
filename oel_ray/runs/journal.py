"""What is known of a stage before it ends: a file of records that only grows. The driver, and extraction workers.

A record is appended whole and is there from then on, whatever happens to the process. Power may fail in the middle of a
line, or a disk fill up: whoever goes on with the file first takes out what is no record.
"""

import shutil
from pathlib import Path
from typing import Generic

from pydantic import ValidationError

from oel_ray.errors import RunFailed
from oel_ray.faults import fault_point
from oel_ray.records import AnyRecord, BadLine, append_jsonl, first_problem
from oel_ray.runs.files import write_atomically


class Journal(Generic[AnyRecord]):
    """State: the file, and the records in it, in order. It may travel to the one process that goes on with it."""

    def __init__(self, path: Path, kind: type[AnyRecord], bad: Path, name: str) -> None:
        """Read what is there; lines that are no record move to `bad`, with their number and what is wrong with them.

        `name` and the number of records name the fault point behind each record.
        """
        self.path, self._kind, self._bad, self._name = path, kind, bad, name
        self.records: list[AnyRecord] = []
        self.damaged: list[BadLine] = []
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        for number, line in enumerate(lines, start=1):
            try:
                self.records += [kind.from_json(line)] if line else []
            except ValidationError as error:
                text = line.decode(errors="backslashreplace")
                self.damaged.append(BadLine(line=number, reason=first_problem(error), text=text))
        if self.damaged:
            bad.parent.mkdir(parents=True, exist_ok=True)
            before = bad.read_bytes() if bad.exists() else b""  # of an earlier reading
            write_atomically(bad, before + b"".join(line.to_json() + b"\n" for line in self.damaged))
        if self.damaged or lines[-1]:  # the last line may lack no more than its end
            self.cut(len(self.records))

    def read_again(self) -> "Journal[AnyRecord]":
        """As the file is by now."""
        return Journal(self.path, self._kind, self._bad, self._name)

    def cut(self, length: int) -> None:
        """Forget all records behind the first `length` ones."""
        self.records = self.records[:length]
        write_atomically(self.path, b"".join(record.to_json() + b"\n" for record in self.records))

    def append(self, record: AnyRecord) -> None:
        """Write one record.

        Raises:
            RunFailed: the file cannot be written, for one because the disk is full; says what is free there.
        """
        try:
            append_jsonl(self.path, record)
        except OSError as error:
            free = shutil.disk_usage(self.path.parent).free
            raise RunFailed(f"cannot write to {self.path}: {error.strerror}, {free} bytes are free") from error
        self.records.append(record)
        fault_point(f"{self._name}:{len(self.records)}-done")
