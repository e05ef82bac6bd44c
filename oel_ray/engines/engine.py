"""Run one vLLM replica. Runs as a Ray actor on the node of its CPUs or GPUs.

vLLM starts its engine core, which runs the model, in a child process. With tensor parallelism it starts one more
process per rank.
"""

import asyncio
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oel_ray.cluster.stacks import Named
from oel_ray.config.schema import EnginesConfig
from oel_ray.engines.startup import StartLog
from oel_ray.errors import EngineUnavailable, RunFailed
from oel_ray.records import Generation, Sampling

CANARY_DEADLINE_S = 30.0
_PORT_ATTEMPTS = 3
# vLLM searches for a free port upwards from a given one and binds it later. Engines that start together search
# different ranges. The ranges lie below the kernel's ephemeral ports and above those of Ray's workers.
_PORTS = range(20_000, 32_000, 20)


class Engine(Named):
    """A vLLM `AsyncLLM` with token ids in and out, and weight syncs that are safe to serve after.

    State: the weights and their version, the prefix cache, the requests in flight. All of it dies with the actor.
    """

    def __init__(self, index: int, config: EnginesConfig, policy: str, *, on_gpu: bool, **vllm_args: Any) -> None:
        """`policy`: an HF folder. `vllm_args` override our arguments of vLLM. `start` does the work."""
        self.index = index
        self._llm: Any = None
        self._requests = 0
        self._sync_failed = False
        self._sync_open = False
        vllm_args = {"served_model_name": f"engine-{index}"} | vllm_args
        self._vllm_args = engine_args(config, policy, on_gpu=on_gpu) | vllm_args
        if not on_gpu:
            prepare_cpu(index, config)

    async def start(self, version: str = "") -> None:
        """Load the policy, label it if there is a `version`, and get ready to serve.

        Raises:
            RunFailed: vLLM did not start; says why.
        """
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        for attempt in range(_PORT_ATTEMPTS):
            os.environ["VLLM_PORT"] = str(_PORTS[(os.getpid() + attempt * 7) % len(_PORTS)])
            log = StartLog()
            try:
                args = AsyncEngineArgs(**self._vllm_args)
                self._llm = AsyncLLM.from_engine_args(args, stat_loggers=stat_loggers())
                break
            except Exception as error:  # noqa: BLE001 - whatever stops vLLM is told, in one line
                cause = log.cause(error)
                if "address already in use" not in cause.lower() or attempt == _PORT_ATTEMPTS - 1:
                    raise RunFailed(f"engine {self.index} did not start: {cause}") from None
        if version:
            await self._llm.update_weight_version(version)

    async def generate(self, prompt_ids: list[int], sampling: Sampling, seed: int, deadline_s: float) -> Generation:
        """Generate one response.

        Raises:
            TimeoutError: no complete response within `deadline_s`; the request is aborted.
            EngineUnavailable: this engine can no longer serve.
            RuntimeError: the response mixes weight versions.
        """
        self._requests += 1
        with self._able_to_serve():
            async with asyncio.timeout(deadline_s):
                return await self._generate(f"{self.index}-{self._requests}", prompt_ids, sampling, seed)

    async def _generate(self, request_id: str, prompt_ids: list[int], sampling: Sampling, seed: int) -> Generation:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        output_kind = RequestOutputKind.FINAL_ONLY
        params = SamplingParams(**sampling.model_dump(), seed=seed, output_kind=output_kind, detokenize=False)
        async for request in self._llm.generate({"prompt_token_ids": list(prompt_ids)}, params, request_id):
            output = request.outputs[0]
        versions = {span.version for span in output.weight_versions or []}
        if len(versions) != 1:
            raise RuntimeError(f"a response of engine {self.index} carries weight versions {sorted(versions)}")
        token_ids = list(output.token_ids)
        said = token_ids[:-1] if output.finish_reason == "stop" else token_ids
        # Decode the whole response at once, because vLLM's decoding token by token takes a tenth of a core.
        text = self._llm.get_tokenizer().decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Generation(
            token_ids=token_ids,
            text=text,
            finish_reason=output.finish_reason or "",
            weight_version=versions.pop(),
            cached_tokens=request.num_cached_tokens or 0,
        )

    async def check_health(self) -> str:
        """Check the health of the engine and return the weight version that it serves.

        Raises:
            EngineUnavailable: a child process is gone, or a weight sync failed or was left unfinished.
        """
        if self._sync_open:  # nobody asks during a sync, so its sender must be gone
            raise EngineUnavailable(f"engine {self.index} was left in the middle of a weight sync and cannot serve")
        with self._able_to_serve():
            await self._llm.check_health()
            return str(await self._llm.get_weight_version())

    async def progress(self) -> None:
        """Return after vLLM's engine core has answered between two steps, which proves that it still makes progress.

        Returns at once during a weight sync, because a sync blocks the core and has a deadline of its own.

        Raises:
            EngineUnavailable: see `check_health`.
        """
        if not self._sync_open:
            await self.check_health()

    async def canary(self) -> None:
        """Answer a request of one token, as every engine must before it may serve.

        Raises:
            RunFailed: the engine cannot.
        """
        greedy = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=1)
        answer = await self.generate([1], greedy, 0, CANARY_DEADLINE_S)
        if len(answer.token_ids) != 1:
            raise RunFailed(f"engine {self.index} was to write one token and wrote {len(answer.token_ids)}")

    @contextmanager
    def _able_to_serve(self) -> Iterator[None]:
        """Translate vLLM's error into one of ours, because a client would have to import vLLM to unpickle that."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._sync_failed:
            raise EngineUnavailable(f"engine {self.index} failed a weight sync and cannot serve")
        try:
            yield
        except EngineDeadError:
            raise EngineUnavailable(f"engine {self.index} lost a vLLM process") from None

    # A sync is init (once per group), start, update, finish, each on all engines before the next. If one of the last
    # three fails, the weights are neither the old nor the new ones. vLLM would start another update on top of them.

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        try:
            with self._able_to_serve():
                yield
        except BaseException:
            self._sync_failed, self._sync_open = True, False
            raise

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info))

    async def start_weight_update(self) -> None:
        """Wait for requests in flight, hold back new ones, and open the model for new weights."""
        with self._all_or_nothing():
            self._sync_open = True
            await self._llm.pause_generation(mode="wait", clear_cache=False)
            await self._llm.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        with self._all_or_nothing():
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info))

    async def finish_weight_update(self, version: str) -> None:
        """Check and close the update, drop the stale prefix cache, set the version, and serve again.

        Raises:
            RuntimeError: the weights were incomplete or the cache could not be dropped. The engine must not serve.
        """
        with self._all_or_nothing():
            await self._llm.finish_weight_update()
            await self.drop_cache()
            await self._llm.update_weight_version(version)
            await self._llm.resume_generation()
            self._sync_open = False

    async def drop_cache(self) -> None:
        """Drop the prefix cache. While requests run vLLM's reset does nothing, and only its result says so."""
        if not await self._llm.reset_prefix_cache():
            raise RuntimeError(f"engine {self.index} could not reset its prefix cache")

    async def load_policy(self, folder: str, version: str) -> None:
        """Load the weights of an HF folder that has the same tensors as the one the engine was started from."""
        await self.start_weight_update()
        await self.update_weights({"folder": folder})
        await self.finish_weight_update(version)

    async def shutdown(self) -> None:
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None


def engine_args(config: EnginesConfig, policy: str, *, on_gpu: bool) -> dict[str, Any]:
    """Build the arguments that vLLM is started with."""
    from vllm.config import WeightTransferConfig

    from oel_ray.weights.plugin import GLOO, NCCL

    if config.dtype == "auto":  # to vLLM it would mean the precision of the folder
        raise ValueError("engines.dtype is auto: see RunConfig.settled")
    args: dict[str, Any] = {
        "model": policy,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "enable_prefix_caching": True,
        "weight_transfer_config": WeightTransferConfig(backend=NCCL if on_gpu else GLOO),
        "disable_log_stats": True,
        "seed": 0,
        # Not "ray", which vLLM would choose for its ranks inside an actor with a placement group.
        "distributed_executor_backend": "mp" if config.tensor_parallel > 1 else "uni",
    }
    if on_gpu:
        return args | {"gpu_memory_utilization": config.gpu_memory_utilization}
    # Prompts are prefilled whole. In pieces vLLM would rewind the seeded generator, a CPU generator cannot do that, and
    # the worker would die.
    return args | {
        "kv_cache_memory_bytes": config.cpu_kv_cache_gib * 2**30,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(config.max_model_len, 4096),
        # The smallest size that is fast on CPUs, because a game grows by less than vLLM's default of 128 tokens a turn.
        "block_size": 32,
    }


def stat_loggers() -> list[Any]:
    """Return vLLM's metrics logger for Ray, if the packages that it imports are installed (the extra `metrics`)."""
    try:
        importlib.import_module("ray.serve")
    except ImportError:
        return []
    from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

    return [RayPrometheusStatLogger]


def prepare_cpu(index: int, config: EnginesConfig) -> None:
    """Set the environment variables that vLLM's processes read before they load torch."""
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.exists() and "LD_PRELOAD" not in os.environ:
        os.environ["LD_PRELOAD"] = str(openmp)
    if config.tensor_parallel == 1:
        # Run the model in vLLM's scheduler process. Two processes would wait for each other by spinning, and would take
        # half of the cores that they share.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["OMP_NUM_THREADS"] = str(config.cpu_threads)
        return
    # Every rank gets cores of its own, because vLLM's "auto" puts all engines of a node on the same ones.
    cores, threads = sorted(os.sched_getaffinity(0)), config.cpu_threads
    first = index * config.tensor_parallel * threads
    mine = [str(cores[(first + n) % len(cores)]) for n in range(config.tensor_parallel * threads)]
    ranks = [",".join(sorted(set(mine[n : n + threads]))) for n in range(0, len(mine), threads)]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(ranks)
