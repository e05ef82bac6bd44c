"""Translate failures of actor calls into one line. Any process that waits for an actor."""

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from oel_ray.errors import EngineUnavailable, RunFailed, one_line

DIED = (RayActorError, OutOfMemoryError, ObjectLostError)
"""Errors of a call whose actor died, was killed by Ray because memory ran out, or lost its answer with its node."""


def plain(error: BaseException) -> RunFailed:
    """Extract the actor's own error from Ray's, without Ray's traceback."""
    if isinstance(error, RayTaskError):
        return plain(error.cause)
    if isinstance(error, RunFailed):
        return error
    if isinstance(error, DIED):
        return EngineUnavailable(f"an engine died: {one_line(error, 0)}")
    return RunFailed(f"engines: {one_line(error)}")
