"""Makes the run folders in `data/runs.tar.xz`: `python -m tests.compat.make_runs`, a few minutes on two cores.

They are one run at three times: killed while it played the games of round 2, killed while it read them, and at its
end. Its model is as small as engines take. From round 2 on a run needs nothing outside its folder, so those that were
killed go on wherever they are unpacked. The model that round 0 names comes with them.

Left out is `tensorboard/`, which nothing reads. The locks of dead drivers are kept, with another host in them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.tiny_models import tiny_model
from tests.support.tokenizers_for_tests import small_tokenizer

ARCHIVE = Path(__file__).parent / "data" / "runs.tar.xz"
MODEL, IN_COLLECT, IN_EXTRACT, FINISHED = "model", "in-collect", "in-extract", "finished"
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
SETTINGS = [
    "rounds=2",
    "thinking=false",
    "env.params.size=3",
    "env.params.num_holes=2",
    "env.max_turns=3",
    "collect.players=1",
    "collect.extraction_games=3",
    "collect.sampling.max_tokens=8",
    "extract.format=unstructured",
    "extract.show_previous=true",
    "extract.seeds=2",
    "extract.max_tokens=64",
    "extract.sampling.max_tokens=24",
    "consolidate.workers=1",
    "consolidate.steps=2",
    "consolidate.keep_steps=[1]",
    "consolidate.games_per_step=2",
    "consolidate.learning_rate=1e-3",
    "consolidate.sampling.max_tokens=8",
    "evaluate.maps=2",
    "evaluate.seeds=1",
    "evaluate.accumulation_steps=[1]",
    "evaluate.sampling.max_tokens=8",
    "gate.enabled=true",
    "gate.max_loss=1",
    "engines.count=1",
]
"""On top of the preset `exact`. The gate lets every policy pass, or round 2 could start from the model outside."""


def save_model(folder: Path) -> None:
    """Write a Hugging Face folder of about thirty thousand random numbers."""
    tokenizer = small_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("eos", "pad")}
    tiny_model("qwen3", vocab_size=len(tokenizer), tied=True, seed=0, **SIZES, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def drive(folder: Path, *arguments: str, until: str | None = None) -> None:
    """Run or resume to the end, or until the driver is dead behind a fault point.

    The driver itself ends there, or the extraction worker, and then the driver before another worker is there.
    """
    points = folder.with_suffix(".points")
    points.write_text("")
    command = [sys.executable, "-m", "oel_ray", "run", *arguments, "--run-dir", str(folder)]
    driver = subprocess.Popen(
        command, env={**os.environ, "OEL_RAY_POINTS_FILE": str(points), "OEL_RAY_KILL_AFTER": until or ""}
    )
    while driver.poll() is None:
        time.sleep(0.01)
        if until and until in points.read_text().split("\n"):
            driver.kill()
    if driver.returncode != (-signal.SIGKILL if until else 0):
        raise SystemExit(f"the run ended with exit code {driver.returncode}")


def keep(folder: Path, copy: Path) -> None:
    """Copy what a run folder holds now, without this machine's name."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("tensorboard"))
    lock = copy / "lock.json"
    if lock.exists():
        holder = json.loads(lock.read_bytes()) | {"host": "elsewhere", "command": "oel run"}
        lock.write_text(json.dumps(holder, separators=(",", ":")) + "\n")


def pack(root: Path, names: list[str], archive: Path) -> None:
    """Pack folders, with equal files behind each other, so that they take their room once."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mtime = int(member.mtime)
        return member

    settings: dict[str, Any] = {"preset": 9, "format": tarfile.PAX_FORMAT}
    with tarfile.open(archive, "w:xz", **settings) as tar:
        for name in names:
            tar.add(root / name, name, filter=plain)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="oel-ray-") as name:
        root = Path(name)
        save_model(root / MODEL)
        run = root / "run"
        drive(run, "exact", f"model={root / MODEL}", *SETTINGS, until="2:collect:3-done")
        keep(run, root / IN_COLLECT)
        drive(run, "--resume", until="2:extract:2-done")
        keep(run, root / IN_EXTRACT)
        drive(run, "--resume")
        keep(run, root / FINISHED)
        pack(root, [MODEL, IN_COLLECT, IN_EXTRACT, FINISHED], ARCHIVE)
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
