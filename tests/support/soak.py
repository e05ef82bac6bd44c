"""A long run in which a part is killed every 20 s: `python -m tests.support.soak MINUTES [FOLDER]`, or `make soak`.

Players, engine actors, their cores, extraction workers, training ranks and the driver itself are killed by their
process ids, whichever kind was killed least. Whenever the driver ends, the run is gone on with. At the end it is
stopped, `oel verify` must find nothing lost or doubled, and a table says how often each kind was killed.
"""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.e2e.test_run import MARK, SMALL, left_over
from tests.support.tiny_models import save_tiny_model

# Ray titles a process `ray::Class.method`, or `ray::name:Class.method` for an actor that has a name.
KINDS = {
    "player": r"^ray::(\S+:)?Player\b",
    "engine actor": r"^ray::(\S+:)?Engine\b",
    "engine core": r"EngineCore",
    "extraction worker": r"^ray::(\S+:)?ExtractionWorker\b",
    "training rank": r"^ray::(\S+:)?RayTrainWorker\b",
}
DRIVER = "driver"
EVERY_S = 20.0
STOP_S = 120.0
# Stages of about half a minute each on two cores, and no limit to what is made good.
SETTINGS = [
    *SMALL,
    "rounds=1000",
    "collect.extraction_games=16",
    "collect.sampling.max_tokens=64",
    "collect.max_error_rate=1",
    "extract.max_tokens=512",
    "extract.sampling.max_tokens=160",
    "consolidate.steps=8",
    "consolidate.games_per_step=4",
    "consolidate.checkpoint_every=1",
    "consolidate.max_failures=100000",
    "engines.max_restarts=100000",
    "engines.stall_deadline_s=30",
]


def parts(driver: int) -> dict[str, list[psutil.Process]]:
    """The processes of a run that may be killed, by kind."""
    found: dict[str, list[psutil.Process]] = {}
    try:
        found[DRIVER] = [psutil.Process(driver)]
        for process in found[DRIVER][0].children(recursive=True):
            title = " ".join(process.cmdline())
            for kind, pattern in KINDS.items():
                if re.search(pattern, title):
                    found.setdefault(kind, []).append(process)
    except psutil.Error:  # it ended while we looked
        pass
    return found


def start(folder: Path, model: Path) -> "subprocess.Popen[bytes]":
    new = ["exact", f"model={model}", *SETTINGS]
    arguments = ["--resume"] if (folder / "run.json").exists() else new
    command = [sys.executable, "-m", "oel_ray", "run", *arguments, "--run-dir", str(folder)]
    with Path(f"{folder}.log").open("ab") as log:
        return subprocess.Popen(command, env={**os.environ, MARK: str(os.getpid())}, stdout=log, stderr=log)


def soak(folder: Path, model: Path, minutes: float, choice: random.Random) -> tuple[Counter[str], Counter[int]]:
    """Kill and go on for so many minutes; how often each kind was killed, and how the driver ended."""
    killed: Counter[str] = Counter(dict.fromkeys((*KINDS, DRIVER), 0))
    ends: Counter[int] = Counter()
    end = time.monotonic() + 60 * minutes
    due = time.monotonic() + EVERY_S
    driver = start(folder, model)
    while time.monotonic() < end:
        time.sleep(0.2)
        if driver.poll() is not None:
            ends[driver.returncode] += 1
            driver = start(folder, model)
        there = parts(driver.pid)
        least = min(there, key=lambda kind: (killed[kind], choice.random()), default=DRIVER)
        rare = killed[least] == min(killed.values())
        # Some kinds live for a part of a round only: they are waited for, but not for ever.
        if time.monotonic() >= due + (0 if rare else EVERY_S) and least in there:
            victim = choice.choice(there[least])
            victim.kill()
            killed[least] += 1
            due = time.monotonic() + EVERY_S
            print(f"{60 * minutes - (end - time.monotonic()):5.0f} s: {least} {victim.pid} killed", flush=True)
    driver.send_signal(signal.SIGTERM)
    ends[driver.wait(STOP_S)] += 1
    return killed, ends


def main() -> int:
    minutes = float(sys.argv[1])
    root = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp(prefix="oel-soak-"))
    root.mkdir(parents=True, exist_ok=True)
    folder = root / "run"
    before = {process.pid for process in psutil.process_iter()}
    killed, ends = soak(folder, save_tiny_model(root / "model"), minutes, random.Random(0))
    verified = subprocess.run([sys.executable, "-m", "oel_ray", "verify", str(folder), "--replay"], check=False)
    stages = sum(len(path.read_text().split('"completed"')) - 1 for path in folder.glob("rounds/*/MANIFEST.json"))
    print(f"{stages} stages committed in {minutes:g} minutes; the log is {folder}.log")
    print("killed:", *(f"{kind:<20}{count:>4}" for kind, count in killed.items()), sep="\n  ")
    print("the driver ended with:", *(f"exit code {code:<10}{count:>4}" for code, count in ends.items()), sep="\n  ")
    faults = [
        *(["oel verify found something"] if verified.returncode else []),
        *(f"the driver ended with {code}" for code in ends if code not in (0, 1, 130, -signal.SIGKILL)),
        *(f"no {kind} was killed" for kind, count in killed.items() if minutes >= 30 and not count),
        *(f"left over: {process}" for process in left_over(before)),
    ]
    print(*faults or ["nothing was lost"], sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
