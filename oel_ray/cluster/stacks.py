"""What the actors of a run are at when one of them has missed a deadline, before it is ended. Any process of a run.

`RUN/hang/TIME/ACTOR.txt` has the stacks of all threads of an actor, as it tells them itself. All are asked that have a
name in the run's namespace. Ray Train gives the training ranks none: a rank tells its own when a deadline of its own
has passed, as that of a collective does on all ranks.
"""

import faulthandler
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from oel_ray.errors import one_line

HANG_FOLDER = "OEL_RAY_HANG_FOLDER"
"""The variable that says where; without it nothing is written."""
WATCH = "watch"
"""The concurrency group, with a thread of its own, in which our actors answer whatever else they do."""
ANSWER_S = 1.0


class Named:
    """An actor that goes by the name it was started with, in Ray's dashboard and logs."""

    def __repr__(self) -> str:
        import ray

        # Asked outside of a Ray, Ray would start one.
        name = ray.get_runtime_context().get_actor_name() if ray.is_initialized() else None
        return name or super().__repr__()


def stacks(_actor: Any) -> str:
    """What all threads of this process are at."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


def dump_stacks(own: str = "") -> None:
    """Write what every actor is at; of one that does not answer within a second, that it does not.

    `own` is a name for this process, to be added, if it has none that the others know.
    """
    import ray

    if not os.environ.get(HANG_FOLDER):
        return
    folder = Path(os.environ[HANG_FOLDER]) / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    if own:
        (folder / f"{own}.txt").write_text(stacks(None))
    asked = {}
    for name in ray.util.list_named_actors():
        with suppress(ValueError):  # it has ended meanwhile
            asked[name] = ray.get_actor(name).__ray_call__.options(concurrency_group=WATCH).remote(stacks)
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
    for name, answer in asked.items():
        try:
            text = ray.get(answer, timeout=0)
        except ray.exceptions.RayError as error:
            text = f"no answer within {ANSWER_S:.0f} s: {one_line(error, 0)}\n"
        (folder / f"{name}.txt").write_text(text)
