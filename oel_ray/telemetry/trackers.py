"""Write the scalars of a run to TensorBoard, and to Weights & Biases if configured. Runs in the driver.

W&B must not harm the run, so a thread of its own writes to it. A failure is reported once, and W&B gets nothing after
it.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from oel_ray.config.schema import RunConfig

Note = Callable[[str], None]
Write = Callable[[Mapping[str, float], int], None]
"""Takes scalars by name, and their step."""
Track = Callable[[str, Mapping[str, Any], int], None]
"""Takes a group, a row, whose numbers are the scalars `GROUP/KEY`, and its step."""
LAST_WORDS_S = 20.0
"""Seconds that the end of a run waits for scalars that are not written yet."""


@contextmanager
def tracking(config: RunConfig, run_id: str, folder: Path, note: Note) -> Iterator[Track]:
    """Open the trackers for the time of a run. At the end all scalars are written."""
    from tensorboardX import SummaryWriter

    wandb = wandb_run(run_id, folder, config.model_dump(mode="json"))
    also = aside("W&B", wandb, note) if config.tracking == "wandb" else nullcontext(lambda scalars, step: None)
    with SummaryWriter(str(folder / "tensorboard"), flush_secs=10) as board, also as write:

        def track(group: str, row: Mapping[str, Any], step: int) -> None:
            scalars = {f"{group}/{key}": value for key, value in row.items() if isinstance(value, int | float)}
            for name, value in scalars.items():
                board.add_scalar(name, value, step)
            write(scalars, step)

        yield track


@contextmanager
def aside(name: str, writer: AbstractContextManager[Write], note: Note) -> Iterator[Write]:
    """Wrap a writer so that calls return at once, whether the writer works, fails or hangs."""
    waiting: queue.SimpleQueue[tuple[Mapping[str, float], int] | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            with writer as write:
                while said := waiting.get():
                    write(*said)
        except Exception as error:  # noqa: BLE001 - somebody else's code may raise anything
            note(f"the run goes on without {name}: {type(error).__name__}: {error}")

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        yield lambda scalars, step: waiting.put((scalars, step))
    finally:
        waiting.put(None)
        thread.join(LAST_WORDS_S)


@contextmanager
def wandb_run(run_id: str, folder: Path, config: Mapping[str, Any]) -> Iterator[Write]:
    """Open a W&B run with that id, which a resumed run continues. wandb's own variables configure it.

    W&B has one axis, which never goes back, so the steps of stages and of training are scalars `GROUP/at`.
    """
    import wandb

    with wandb.init(id=run_id, name=folder.name, dir=folder, config=config, resume="allow") as run:
        yield lambda scalars, step: run.log({**scalars, f"{min(scalars).partition('/')[0]}/at": step})
