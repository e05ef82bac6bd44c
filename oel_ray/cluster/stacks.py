"""Write the stacks of every actor after one of them missed a deadline, before it is killed. Any process of a run.

`RUN/hang/TIME/ACTOR.txt` holds the stacks of all threads of an actor, as the actor reports them. All actors with a name
in the run's namespace are asked. Ray Train gives the training ranks no names. A rank writes its own stacks after its
own deadline has passed; the deadline of a collective passes on all ranks.
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
"""The environment variable with the folder; without it nothing is written."""
WATCH = "watch"
"""The concurrency group, with a thread of its own, in which our actors answer while they are busy."""
ANSWER_S = 1.0


class Named:
    """An actor that Ray's dashboard and logs show under the name it was started with."""

    def __repr__(self) -> str:
        import ray

        # Outside of Ray this call would start one.
        name = ray.get_runtime_context().get_actor_name() if ray.is_initialized() else None
        return name or super().__repr__()


def stacks(_actor: Any) -> str:
    """Format the stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


def dump_stacks(own: str = "") -> None:
    """Write the stacks of every actor, or that it did not answer within a second.

    `own` is a name for this process, whose stacks are then added, if it is no named actor.
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
        with suppress(ValueError):  # the actor has ended meanwhile
            asked[name] = ray.get_actor(name).__ray_call__.options(concurrency_group=WATCH).remote(stacks)
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
    for name, answer in asked.items():
        try:
            text = ray.get(answer, timeout=0)
        except ray.exceptions.RayError as error:
            text = f"no answer within {ANSWER_S:.0f} s: {one_line(error, 0)}\n"
        (folder / f"{name}.txt").write_text(text)
