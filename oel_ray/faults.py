"""Define fault points for tests, where a process kills itself or leaves a trace if an environment variable says so. Any
process.
"""

import os
import signal
from pathlib import Path

KILL_AFTER = "OEL_RAY_KILL_AFTER"
POINTS_FILE = "OEL_RAY_POINTS_FILE"


def fault_point(name: str) -> None:
    """Die here by SIGKILL (exit code -9) if `OEL_RAY_KILL_AFTER` equals `name`.

    Before that the name is added, as a line, to the file that `OEL_RAY_POINTS_FILE` names.
    """
    if path := os.environ.get(POINTS_FILE):
        with Path(path).open("a") as file:
            file.write(name + "\n")
    if os.environ.get(KILL_AFTER) == name:
        os.kill(os.getpid(), signal.SIGKILL)
