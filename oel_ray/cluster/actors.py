"""What all of our actors have in common: a name, a watch group, and how they die. Any process that talks to actors."""

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from oel_ray.errors import EngineUnavailable, RunFailed, one_line

WATCH = "watch"
"""The concurrency group, with a thread of its own, in which our actors answer whatever else they do."""


class Named:
    """An actor that goes by the name it was started with, in Ray's dashboard and logs."""

    def __repr__(self) -> str:
        import ray

        # Asked outside of a Ray, Ray would start one.
        name = ray.get_runtime_context().get_actor_name() if ray.is_initialized() else None
        return name or super().__repr__()


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
