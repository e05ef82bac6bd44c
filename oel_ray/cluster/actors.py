"""How calls of our actors fail, in one line. Any process that waits for an actor."""

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from oel_ray.errors import EngineUnavailable, RunFailed, one_line

DIED = (RayActorError, OutOfMemoryError, ObjectLostError)
"""How a call ends whose actor is gone; if Ray ended it to save the machine; if its answer went with its node."""


def plain(error: BaseException) -> RunFailed:
    """What went wrong in an actor, without Ray's account of how it got here."""
    if isinstance(error, RayTaskError):
        return plain(error.cause)
    if isinstance(error, RunFailed):
        return error
    if isinstance(error, DIED):
        return EngineUnavailable(f"an engine died: {one_line(error, 0)}")
    return RunFailed(f"engines: {one_line(error)}")
