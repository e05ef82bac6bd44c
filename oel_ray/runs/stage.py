"""One stage of one round while it works: files written, journals, and the commit. Runs in the driver."""

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from oel_ray.faults import fault_point
from oel_ray.records import AnyRecord, KnowledgeText, content_hash
from oel_ray.runs import layout
from oel_ray.runs.files import FileEntry, files_below, now, seal, sync_folder, write_atomically, write_json
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.journal import Journal
from oel_ray.runs.layout import RoundFiles, StageEntry


class Stage:
    """One stage of a round: `begin`, write below `out`, `commit`. It is done iff the manifest names it."""

    def __init__(self, folder: RunFolder, round_number: int, name: str) -> None:
        self.round = round_number
        self.name = name
        self._folder = folder
        self._final = folder.files(round_number)
        self.out = RoundFiles(self._final.root / f"{layout.WORK}{name}")
        """Where the stage writes; its private folder until the commit."""
        self._started = time.monotonic()

    @property
    def entry(self) -> StageEntry | None:
        return self._folder.manifest(self.round).stages.get(self.name)

    @property
    def is_done(self) -> bool:
        return self.entry is not None

    def begin(self, *inputs: Any) -> RoundFiles:
        """Start with what an attempt at the same inputs left in the work folder, or else with nothing; returns `out`.

        What any other attempt left is set aside, and without inputs all are others.
        """
        root, left = self.out.root, self.out.root / "inputs"
        key = content_hash(repr(inputs))
        if root.exists() and not (inputs and left.is_file() and left.read_text() == key):
            self._folder.set_aside([root])
        for name in ("trajectories", "knowledge", "consolidation", "policy"):
            (root / name).mkdir(parents=True, exist_ok=True)
        write_atomically(left, key.encode())
        return self.out

    def journal(self, file: str, kind: type[AnyRecord], note: Callable[[str], None]) -> Journal[AnyRecord]:
        """What attempts at this stage have written to a file of the work folder so far, to be gone on with."""
        path = self.out.root / file
        bad = self._folder.quarantine / path.relative_to(self._folder.path)
        journal = Journal(path, kind, bad, f"{self.round}:{self.name}")
        if journal.damaged:
            note(f"{len(journal.damaged)} damaged lines of {path} were moved to {bad}")
        return journal

    def commit(self, outputs: Iterable[str | Path], counts: dict[str, int]) -> None:
        """Publish files and whole folders of the work folder, then mark the stage done.

        `outputs` are paths below `out`, absolute or relative to it. `counts` has the number of lines of each JSONL
        file under the file's stem, e.g. {"extraction": 25}, and "knowledge" for the number of knowledge texts.

        Raises:
            RunFailed: the lock was lost.
        """
        assert self._folder.lock is not None, "the run folder is open for reading only"
        work, final = self.out.root, self._final.root
        names = sorted({(work / output).relative_to(work) for output in outputs})
        files: dict[str, FileEntry] = {}
        for name in names:
            for file in files_below(work / name):
                files[file.relative_to(work).as_posix()] = seal(file)
        self._folder.lock.check()
        for name in names:
            target = final / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (work / name).replace(target)
            sync_folder(target.parent)
        fault_point(f"{self.round}:{self.name}:moved")
        seconds, changes = round(time.monotonic() - self._started, 3), len(self._folder.info.get("changes", []))
        entry = StageEntry(completed=now(), wall_s=seconds, counts=counts, files=files, config=changes)
        manifest = self._folder.manifest(self.round)
        manifest = manifest.model_copy(update={"stages": {**manifest.stages, self.name: entry}})
        write_json(self._final.manifest, manifest.model_dump())
        shutil.rmtree(work)
        fault_point(f"{self.round}:{self.name}")

    def commit_knowledge(self, texts: Sequence[KnowledgeText]) -> None:
        """Write knowledge texts, and commit them as all that the stage leaves behind; raises what `commit` raises."""
        for text in texts:
            self.out.knowledge(text.seed).write_bytes(text.to_json() + b"\n")
        self.commit([self.out.knowledge(text.seed) for text in texts], {"knowledge": len(texts)})
