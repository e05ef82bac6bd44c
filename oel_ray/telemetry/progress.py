"""Show the progress of a run: bars in a terminal, status lines elsewhere. Runs in the driver."""

import threading
import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from oel_ray.formats import duration
from oel_ray.runs.folder import RunFolder

STATUS_INTERVAL_S = 1.0


class StageProgress:
    """The progress of one stage, shown from the start of the block. `update` may be called from any thread."""

    def __init__(self, owner: "Progress", round_number: int, rounds: int, name: str, total: int, unit: str) -> None:
        self.done = 0
        self._owner = owner
        self._where = {"round": round_number, "stage": name}
        self._label = f"[round {round_number}/{rounds}] {name}"
        self.total = total
        self._unit = unit
        self._note = ""
        self._started = time.monotonic()
        self._said = self._written = -float("inf")
        self._guard = threading.Lock()
        self._closed = threading.Event()
        self._bars: Bars | None = None
        if owner.console.is_terminal:
            columns = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False))
            self._bars = Bars(
                TextColumn("{task.description}", markup=False), BarColumn(20), *columns, console=owner.console
            )

    def update(self, done: int, note: str = "") -> None:
        """Set how many of the stage's total are done; `note` adds a few words, e.g. the current loss."""
        with self._guard:
            self.done, self._note = done, note
            if self._bars:
                self._bars.update(self._bars.task_ids[0], completed=done, description=self._head(), note=note)
            if time.monotonic() - self._written >= STATUS_INTERVAL_S:
                self._write_status()

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.add_task(self._head(), total=self.total, note="")
            self._bars.start()
        else:
            self._say("")
            threading.Thread(target=self._tick, name="progress", daemon=True).start()
        self._write_status()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._closed.set()
        with self._guard:
            if self._bars:
                self._bars.stop()
            else:
                self._say("stopped" if kind else "done")
            self._write_status()

    def _head(self) -> str:
        return f"{self._label} {self.done}/{self.total} {self._unit}"

    @property
    def eta_s(self) -> float | None:
        """Estimate the seconds until all is done, from the speed so far; None until something is done."""
        elapsed = time.monotonic() - self._started
        return elapsed / self.done * (self.total - self.done) if self.done else None

    def _tick(self) -> None:
        while not self._closed.wait(self._owner.interval_s / 4):
            with self._guard:
                quiet = time.monotonic() - self._said
                if not self._closed.is_set() and quiet >= self._owner.interval_s * 3 / 4:
                    self._say("")

    def _say(self, end: str) -> None:
        self._said = time.monotonic()
        elapsed = self._said - self._started
        eta = f"ETA {duration(self.eta_s)}" if self.eta_s and self.done < self.total else ""
        parts = [self._head(), duration(elapsed) if elapsed >= 1 or end else "", end or eta, self._note]
        self._owner.note(", ".join(filter(None, parts)))

    def _write_status(self) -> None:
        self._written = time.monotonic()
        self._owner.on_status(self)
        if self._owner.folder:
            self._owner.folder.set_status("running", **self._where, done=self.done, total=self.total)


class Progress:
    """The progress output of a run. Without a terminal a stage prints a line at least every `interval_s` seconds."""

    def __init__(
        self, folder: RunFolder | None = None, console: Console | None = None, interval_s: float = 30.0
    ) -> None:
        self.folder = folder
        self.console = console or Console(stderr=True)
        self.interval_s = interval_s
        self.on_status: Callable[[StageProgress], None] = lambda stage: None
        """Called about once a second with the progress of the stage, from any thread."""

    def stage(self, round_number: int, rounds: int, name: str, total: int, unit: str) -> StageProgress:
        return StageProgress(self, round_number, rounds, name, total, unit)

    def note(self, text: str) -> None:
        """Print one line, above the bars if there are any."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
