"""The engine of `benchmarks.sync`. Imported in the engine's process and in vLLM's worker below it."""

import time
from typing import Any

from oel_ray.engines.engine import Engine
from oel_ray.models.folder import checkpoint_tensors


class WorkerLoad:
    """Mixed into vLLM's worker."""

    model_runner: Any

    def load_again(self, folder: str) -> float:
        """Seconds to load the tensors of a folder that have been read and copied before."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        tensors = [(name, tensor.clone()) for name, tensor in checkpoint_tensors(folder)]
        model = self.model_runner.model
        initialize_layerwise_reload(model)
        started = time.perf_counter()
        model.load_weights(iter(tensors))
        seconds = time.perf_counter() - started
        finalize_layerwise_reload(model, self.model_runner.model_config)
        return seconds


class CountedEngine(Engine):
    """An engine that counts what it is called for in syncs, and can load weights that it has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, worker_extension_cls=f"{__name__}.{WorkerLoad.__name__}", **kwargs)
        self._calls = 0

    async def start_weight_update(self) -> None:
        self._calls += 1
        await super().start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        self._calls += 1
        await super().update_weights(update_info)

    async def finish_weight_update(self, version: str) -> None:
        self._calls += 1
        await super().finish_weight_update(version)

    async def calls(self) -> int:
        return self._calls

    async def load_again(self, folder: str) -> float:
        return float((await self._llm.collective_rpc("load_again", args=(folder,)))[0])
