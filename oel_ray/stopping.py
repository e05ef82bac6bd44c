"""How a run is asked to stop: the first SIGINT or SIGTERM lets what has begun come to its end, the second does not.

Runs in the driver's main thread. Outside of `draining` nothing is under way that could be waited for, and the first
signal ends the run as well.
"""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

DRAIN_S = 30.0
_SAID = f"oel: stopping: what has begun may end, for at most {DRAIN_S:.0f} s; once more to stop at once\n"


class Drain:
    """Whether to stop. State: whether somebody asked, and when there is nothing more to wait for."""

    asked = False
    """Begin nothing more."""
    _end = math.inf

    @property
    def over(self) -> bool:
        """Wait no longer for what has begun."""
        return time.monotonic() > self._end

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self._end = True, time.monotonic() + DRAIN_S
        os.write(2, _SAID.encode())  # not printed: the signal may have come in the middle of a print


@contextmanager
def draining() -> Iterator[Drain]:
    """For a block that looks at the drain and ends by itself.

    Raises:
        KeyboardInterrupt: at the end of the block if somebody asked, anywhere in it if somebody asked twice.
    """
    drain = Drain()
    before = {number: signal.signal(number, drain.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield drain
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if drain.asked:
        raise KeyboardInterrupt
