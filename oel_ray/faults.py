"""Fault points for tests: where a process kills itself if an environment variable says so. Any process."""

import os
import signal

KILL_AFTER = "OEL_RAY_KILL_AFTER"


def fault_point(name: str) -> None:
    """Die here by SIGKILL (exit code -9) if `OEL_RAY_KILL_AFTER` equals `name`."""
    if os.environ.get(KILL_AFTER) == name:
        os.kill(os.getpid(), signal.SIGKILL)
