"""Stop a run on signals: the first SIGINT or SIGTERM lets work in progress finish, the second does not.

Runs in the driver's main thread. Outside of `draining` there is no work to wait for, so the first signal ends the run.
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
    """The request to stop. State: whether it was made, and when the wait ends."""

    asked = False
    """True after the first signal: start nothing more."""
    _end = math.inf

    @property
    def over(self) -> bool:
        """Tell whether the wait for work in progress is over."""
        return time.monotonic() > self._end

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self._end = True, time.monotonic() + DRAIN_S
        os.write(2, _SAID.encode())  # not printed, because the signal may interrupt a print


@contextmanager
def draining() -> Iterator[Drain]:
    """Handle signals for a block that checks the drain and ends by itself.

    Raises:
        KeyboardInterrupt: at the end of the block after one signal, anywhere in it after two.
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
