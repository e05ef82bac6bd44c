"""The responses that a step trains on: asked of the engines, exchanged between the ranks. Training workers.

On-policy, the student of the step writes them from the bare prompt. With `max_staleness` 1 the next step's are asked
for while this one trains, of the weights before it. Off-policy, the round's first policy writes them with the knowledge
in its prompt: it never changes, so nothing is stale and the next step's can always be asked for.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch.distributed as dist

from oel_ray.consolidate.job import Job
from oel_ray.consolidate.prefixes import Draw
from oel_ray.errors import RunFailed
from oel_ray.records import Generation
from oel_ray.seeds import derive_seed


class Responses:
    """This rank's part in asking for responses. All methods are called on every rank, in the same order."""

    def __init__(self, job: Job, head: int, knowledge_ids: Sequence[Sequence[int]], rank: int, world_size: int) -> None:
        """`head`: how many ids of every prompt are the plain head; `knowledge_ids` stand there in a teacher's."""
        self._job, self._head, self._knowledge_ids = job, head, knowledge_ids
        self._rank, self._world_size = rank, world_size
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="responses")
        self._asked: dict[int, tuple[str, Future[list[Generation]]]] = {}
        self.by_teacher = job.config.consolidate.responses == "teacher"
        self.ahead = self.by_teacher or job.config.consolidate.max_staleness > 0

    def ask(self, step: int, version: str) -> None:
        """Begin to ask for this rank's share of a step, unless the round has no such step. Returns at once.

        `version`: the weights that the engines serve, and will serve until all ranks have what they asked for.
        """
        if step < len(self._job.plan):
            mine = self._job.plan[step][self._rank :: self._world_size]
            self._asked[step] = version, self._thread.submit(asyncio.run, self._share(step, mine))

    def wait(self, step: int) -> None:
        """Return when all ranks have what they asked for of a step, at once if they did not ask. Collective."""
        if step in self._asked:
            self._asked[step][1].result()
            dist.barrier()

    def take(self, step: int) -> tuple[str, list[Generation]]:
        """The weight version and the responses to all draws of a step that was asked for, in their order. Collective.

        Raises:
            RunFailed: a response was written by other weights than the engines were to serve.
        """
        version, future = self._asked.pop(step)
        shares: list[list[Generation]] = [[] for _ in range(self._world_size)]
        dist.all_gather_object(shares, future.result())
        count = len(self._job.plan[step])
        generations = [shares[index % self._world_size][index // self._world_size] for index in range(count)]
        for generation in generations:
            if (written_by := generation.weight_version) != version:
                raise RunFailed(f"step {step} got a response of weights {written_by}, expected {version}")
        return version, generations

    async def _share(self, step: int, draws: Sequence[Draw]) -> list[Generation]:
        return await asyncio.gather(*(self._one(step, draw) for draw in draws))

    async def _one(self, step: int, draw: Draw) -> Generation:
        job = self._job
        prefix = job.prefixes[draw.prefix]
        seed = derive_seed(job.config.seed, "consolidate", job.round, step, prefix.id)
        prompt_ids, key = list(prefix.prompt_ids), prefix.trajectory_id
        if self.by_teacher:
            prompt_ids = [*self._knowledge_ids[draw.knowledge], *prompt_ids[self._head :]]
            key = job.knowledge[draw.knowledge].id
        return await job.generate(prompt_ids, job.config.consolidate.sampling.sampling(), seed=seed, key=key)
