"""Find out in one line why a vLLM engine did not start. Runs in the engine's actor.

vLLM's processes log the error, and its front end only raises "See root cause above". Under Ray they all write to the
actor's own log files. So the actor can read the lines that were logged since its start.
"""

import os
import re
import stat
from pathlib import Path

from pydantic import ValidationError

_LOGGED_ERROR = re.compile(r" ERROR [^\]]*\] ((?:\w+\.)*\w*(?:Error|Exception): .+)$", re.MULTILINE)
_STANDARD_STREAMS = (1, 2)


class StartLog:
    """Remember where standard output and error end now, if they are files, so that later lines can be read."""

    def __init__(self) -> None:
        self._begin = {
            stream: os.fstat(stream).st_size for stream in _STANDARD_STREAMS if stat.S_ISREG(os.fstat(stream).st_mode)
        }

    def cause(self, error: Exception) -> str:
        """Return the first error that a vLLM process logged, or else the message of `error` itself."""
        if isinstance(error, ValidationError):
            return error.errors()[0]["msg"].removeprefix("Value error, ")
        for stream, begin in self._begin.items():
            found = _LOGGED_ERROR.search(_read(stream, begin))
            if found:
                return found[1]
        return f"{type(error).__name__}: {error}"


def _read(stream: int, begin: int) -> str:
    # Opened again, because the descriptor itself is for writing.
    with Path(f"/proc/self/fd/{stream}").open("rb") as file:
        file.seek(begin)
        return file.read().decode(errors="replace")
