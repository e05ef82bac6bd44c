"""Translate failures of actor calls into one line. Any process that waits for an actor."""

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from oel_ray.errors import EngineUnavailable, RunFailed, one_line

DIED = (RayActorError, OutOfMemoryError, ObjectLostError)
"""Errors of a call whose actor died, was killed by Ray because memory ran out, or lost its answer with its node."""


def failure(error: BaseException) -> str:
    """Say in one line why a call of an actor failed: what the actor raised, or how it died.

    Ray puts the reason of a death last. All other errors begin with theirs.
    """
    cause = error.cause if isinstance(error, RayTaskError) else error
    return one_line(cause, -1 if isinstance(cause, RayActorError) else 0)


def plain(error: BaseException) -> RunFailed:
    """Extract the actor's own error from Ray's, without Ray's traceback."""
    if isinstance(error, RayTaskError):
        return plain(error.cause)
    if isinstance(error, RunFailed):
        return error
    if isinstance(error, DIED):
        return EngineUnavailable(f"an engine died: {failure(error)}")
    return RunFailed(f"engines: {one_line(error)}")
