"""Engines that tests can look into and break. Imported in the engine's process and in vLLM's worker below it."""

from typing import Any

from oel_ray.engines.engine import Engine

WORKER_FAULTS = f"{__name__}.WorkerFaults"


class ProbedEngine(Engine):
    """An engine that also tells what its cache held, and of whose syncs a step can be left out."""

    keeps_stale_cache = False
    freezes = False

    async def logprobs(self, prompt_ids: list[int], top: int) -> list[tuple[int, float]]:
        """The `top` most likely next tokens and their log-probabilities, best first."""
        request = await self._ask(prompt_ids, max_tokens=1, temperature=0.0, logprobs=top)
        ranked = sorted(request.outputs[0].logprobs[0].items(), key=lambda item: -item[1].logprob)
        return [(token, entry.logprob) for token, entry in ranked[:top]]

    async def cached_tokens(self, prompt_ids: list[int]) -> int:
        """How many of a prompt's tokens came from the prefix cache."""
        request = await self._ask(prompt_ids, max_tokens=1)
        return int(request.num_cached_tokens)

    async def sampled_logprobs(self, prompt_ids: list[int], count: int, seed: int) -> list[tuple[int, float]]:
        """`count` sampled tokens, each with the log-probability that it was sampled with."""
        request = await self._ask(prompt_ids, max_tokens=count, ignore_eos=True, temperature=1.0, seed=seed, logprobs=1)
        output = request.outputs[0]
        return [(token, entry[token].logprob) for token, entry in zip(output.token_ids, output.logprobs, strict=True)]

    async def drop_cache(self) -> None:
        if not self.keeps_stale_cache:
            await super().drop_cache()

    async def keep_stale_cache(self, keep: bool) -> None:
        self.keeps_stale_cache = keep

    async def start_weight_update(self) -> None:
        """With `freezes`, without the drain: what is being written stops where it is and goes on after the sync."""
        if not self.freezes:
            await super().start_weight_update()
            return
        with self._all_or_nothing():
            self._sync_open = True
            await self._llm.pause_generation(mode="keep", clear_cache=False)
            await self._llm.start_weight_update()

    async def freeze(self, freeze: bool) -> None:
        self.freezes = freeze

    async def forget_failure(self) -> None:
        """Serve again after a sync that failed when its weights were already there."""
        self._sync_failed = self._sync_open = False
        await self._llm.resume_generation()

    async def in_worker(self, method: str) -> Any:
        """Call a method of `WorkerFaults` in vLLM's worker."""
        return (await self._llm.collective_rpc(method))[0]

    async def _ask(self, prompt_ids: list[int], **sampling: Any) -> Any:
        from vllm import SamplingParams

        self._requests += 1
        params = SamplingParams(**sampling)
        async for request in self._llm.generate({"prompt_token_ids": prompt_ids}, params, f"probe-{self._requests}"):
            last = request
        return last


class BreakableEngine(ProbedEngine):
    """One whose worker can be broken, too, where a pool makes the engine."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, worker_extension_cls=WORKER_FAULTS)


class WorkerFaults:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    weight_transfer_engine: Any

    def leave_out_head_repack(self) -> None:
        self.weight_transfer_engine.repack_tied_head = lambda: None

    def repack_head_again(self) -> None:
        del self.weight_transfer_engine.repack_tied_head
        self.weight_transfer_engine.repack_tied_head()

    def leave_out_completeness(self) -> None:
        self.weight_transfer_engine.check_complete = lambda: None

    def check_completeness_again(self) -> None:
        del self.weight_transfer_engine.check_complete

    def damage_next_weights(self) -> None:
        """Behind the next sync one tensor is not what was sent."""
        model = self.weight_transfer_engine.model
        self.weight_transfer_engine.repack_tied_head = lambda: model.get_parameter("model.norm.weight").data.add_(1)

    def package_folder(self) -> str:
        """Where this process took the package from."""
        import oel_ray

        return oel_ray.__path__[0]
