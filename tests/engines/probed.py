"""Engines that tests can look into and break. Imported in the engine's process and in vLLM's worker below it."""

from typing import Any

from oel_ray.engines.engine import Engine

WORKER_FAULTS = f"{__name__}.WorkerFaults"


class ProbedEngine(Engine):
    """An engine that also tells what its cache held, and that can be made to keep a stale cache."""

    keeps_stale_cache = False

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


class WorkerFaults:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    weight_transfer_engine: Any

    def leave_out_head_repack(self) -> None:
        self.weight_transfer_engine.repack_tied_head = lambda: None

    def repack_head_again(self) -> None:
        del self.weight_transfer_engine.repack_tied_head
        self.weight_transfer_engine.repack_tied_head()

    def package_folder(self) -> str:
        """Where this process took the package from."""
        import oel_ray

        return oel_ray.__path__[0]
