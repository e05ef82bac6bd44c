"""Manage one attempt of a training group: its start, and the checkpoints for the next one. Runs on every rank.

Ray Train restarts the group after a rank died; `--resume` restarts it after the driver died. Both resume from the
newest undamaged checkpoint in the work folder. Ray Train does not know these checkpoints and deletes none.
"""

import shutil
from pathlib import Path

import ray.train
import torch
import torch.distributed as dist

from oel_ray.consolidate import checkpoints
from oel_ray.consolidate.checkpoints import Checkpoint, Spread, State
from oel_ray.consolidate.job import Job
from oel_ray.distill.gather import FullWeights, save_adapters
from oel_ray.distill.step import DistillStep
from oel_ray.errors import EngineUnavailable, RunFailed
from oel_ray.ids import StepVersion
from oel_ray.runs.files import FileEntry, files_below, seal, sync_folder, write_json
from oel_ray.weights.export import export_policy
from oel_ray.weights.sync import WeightSync


class Attempt:
    """Own the attempt's number, its starting point, and the checkpoints that it writes."""

    def __init__(self, job: Job, rank: int, world_size: int) -> None:
        """Reset metrics and samples to the checkpoint that the attempt starts from. Collective."""
        self._job, self._rank, self._world_size = job, rank, world_size
        self._folder = Path(ray.train.get_context().get_storage().experiment_fs_path)
        chosen = [self._choose() if rank == 0 else None]
        dist.broadcast_object_list(chosen)
        assert chosen[0]
        self.number, self._checkpoint = chosen[0]
        fits = self._checkpoint is None or self._checkpoint.state.spread == Spread.of(job)
        self.first_step = self._saved = self._checkpoint.state.step if self._checkpoint else 0
        self.weights = self._checkpoint.folder / checkpoints.WEIGHTS if self._checkpoint and not fits else None
        """Folder of the checkpoint's weights, if the student starts from those because the optimizer state does not
        fit.

        It holds a policy, or adapters for the round's policy.
        """

    def _choose(self) -> tuple[int, Checkpoint | None]:
        job, number, chosen = self._job, checkpoints.next_attempt(self._job), None
        for checkpoint in checkpoints.usable(job):
            if not (damage := checkpoint.damage()):
                chosen = checkpoint
                break
            self.note(f"{damage}: the checkpoint of step {checkpoint.state.step} is not used")
            shutil.rmtree(checkpoint.folder, ignore_errors=True)  # else it would count as one of the kept ones
        if number > 0:
            where = f"after step {chosen.state.step}" if chosen else "from the start"
            self.note(f"round {job.round}: consolidation goes on: attempt {number}, {where} of {len(job.plan)}")
        if chosen and (ours := Spread.of(job)) != chosen.state.spread:
            self.note(
                f"the checkpoint was written with {chosen.state.spread}, and this is {ours}: its weights are taken, "
                "and the optimizer starts anew"
            )
        checkpoints.bring_back_outputs(job, chosen)
        return number, chosen

    def note(self, text: str) -> None:
        """Send a note to the driver, which shows it to the user. From rank 0."""
        with (self._job.scratch / checkpoints.NOTES_FILE).open("a") as file:
            file.write(text + "\n")

    def version(self, step: int) -> str:
        """Label the weights after so many steps."""
        return str(StepVersion(self._job.round, step, self.number))

    def restore(self, step: DistillStep) -> None:
        """Load masters and optimizer state from the checkpoint. Collective."""
        if self._checkpoint is None:
            return
        if self.weights is None:
            step.load(self._checkpoint.folder / checkpoints.DEEPSPEED)
        step.updates = self._checkpoint.state.updates

    def weight_sync(self, weights: FullWeights) -> WeightSync:
        """Create the sender to all engines, after dead and hung ones were replaced. Collective.

        Raises:
            RunFailed: an engine could not be replaced.
        """
        job = self._job
        try:
            engines = job.engines() if self._rank == 0 else []
        except EngineUnavailable as error:
            raise RunFailed(str(error)) from error
        sync = WeightSync(engines, weights, job.config.engines, rank=self._rank, on_gpu=job.on_gpu)
        dist.barrier()  # no rank asks for responses before the pool has handled the earlier calls
        return sync

    def serve(self, sync: WeightSync) -> str:
        """Send the weights that this attempt starts with to the engines; returns their version. Collective.

        They replace the weights that an earlier attempt sent. The round's first policy keeps its version.
        """
        job = self._job
        if self.number == 0 or job.config.consolidate.responses == "teacher":
            return job.deployed
        version = self.version(self.first_step) if self._checkpoint else job.deployed
        sync.send(version)
        dist.barrier()
        return version

    def due(self, done: int) -> bool:
        """Tell whether a checkpoint is due after so many steps, the last of which was applied."""
        return 0 < self._job.config.consolidate.checkpoint_every <= done - self._saved and done < len(self._job.plan)

    def save_last_good(self, done: int, step: DistillStep) -> None:
        """Save the state after `done` steps, the last of which was applied, before the run ends. Collective."""
        if self._job.config.consolidate.checkpoint_every and done > self._saved:
            self.save(done, step)

    def save(self, done: int, step: DistillStep) -> None:
        """Write a checkpoint of the state after so many steps. Collective.

        All but the newest two are deleted, those of earlier attempts included.
        """
        writing, final = (self._folder / f"{dot}step-{done:04d}" for dot in (".", ""))
        if self._rank == 0:
            shutil.rmtree(writing, ignore_errors=True)
            checkpoints.keep_outputs(self._job, done, writing)
        dist.barrier()
        step.save(writing / checkpoints.DEEPSPEED)
        if self._job.config.consolidate.lora is None:
            export_policy(FullWeights(step.student, torch.float32), self._job.policy, writing / checkpoints.WEIGHTS)
        else:
            save_adapters(step.student, writing / checkpoints.WEIGHTS)
        files = self._sealed(writing)
        if self._rank == 0:
            state = State(
                key=checkpoints.job_key(self._job),
                step=done,
                updates=step.updates,
                spread=Spread.of(self._job),
                files=files,
            )
            write_json(writing / checkpoints.STATE_FILE, state.model_dump())
            shutil.rmtree(final, ignore_errors=True)
            writing.rename(final)
            sync_folder(self._folder)
            for old in checkpoints.usable(self._job)[checkpoints.KEPT :]:
                shutil.rmtree(old.folder, ignore_errors=True)
        dist.barrier()  # a rank that ends with an error ends the others too
        self._saved = done

    def _sealed(self, folder: Path) -> dict[str, FileEntry]:
        """Sync all files to disk and fingerprint them, each on one rank."""
        mine = files_below(folder)[self._rank :: self._world_size]
        shares: list[dict[str, FileEntry]] = [{} for _ in range(self._world_size)]
        dist.all_gather_object(shares, {file.relative_to(folder).as_posix(): seal(file) for file in mine})
        return {name: entry for share in shares for name, entry in share.items()}
