"""Where the scalars of a run go besides its own files: TensorBoard, always, and Weights & Biases if asked. The driver.

W&B may not hurt the run: a thread of its own writes to it, and if it fails that is told once and it is left alone.
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
"""Takes scalars by name, and the step that they are of."""
Track = Callable[[str, Mapping[str, Any], int], None]
"""Takes a row of a group, whose numbers are its scalars `GROUP/KEY`, and the step that it is of."""
LAST_WORDS_S = 20.0
"""How long the end of a run waits for what has not been written yet."""


@contextmanager
def tracking(config: RunConfig, run_id: str, folder: Path, note: Note) -> Iterator[Track]:
    """For the time that a run works; at the end all that was told is written."""
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
    """A writer that comes back at once, whether the one behind it works, fails or hangs."""
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
    """A W&B run of that id, which a resumed run goes on with. wandb's own variables say where and how.

    W&B has one axis, which never goes back: steps of stages and of training are scalars, `GROUP/at`.
    """
    import wandb

    with wandb.init(id=run_id, name=folder.name, dir=folder, config=config, resume="allow") as run:
        yield lambda scalars, step: run.log({**scalars, f"{min(scalars).partition('/')[0]}/at": step})
