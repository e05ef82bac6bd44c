"""A driver that consolidates, in a process of its own: `driver.py MODEL FOLDER [KEY=VALUE...]`.

Ray, Ray Train, DeepSpeed and the transport of weights are real; the engine is ours, without vLLM: what it answers
depends on the prompt, the seed and each bit of the weights that it was sent. The variable `SPOILT_STEPS` names steps in
which rank 1 computes NaNs.
"""

import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from safetensors.torch import load_file

from oel_ray.cluster.session import ray_cluster
from oel_ray.config.load import _set_dotted, parse_config, parse_override
from oel_ray.config.schema import RunConfig
from oel_ray.consolidate import stage
from oel_ray.consolidate.job import Job
from oel_ray.consolidate.prefixes import Draw
from oel_ray.errors import RunFailed
from oel_ray.records import Generation, KnowledgeText, Prefix, Sampling
from oel_ray.text.chat import ChatFormat
from oel_ray.weights import gloo

STEPS, PER_STEP = 6, 3
SETTINGS: dict[str, Any] = {
    "policy_dtype": "float32",
    "consolidate": {
        "steps": STEPS,
        "learning_rate": 1e-3,
        "precision": "float32",
        "micro_batch_tokens": 256,
        "gradient_checkpointing": False,
        "checkpoint_every": 2,
        "sampling": {"max_tokens": 8},
    },
    "collect": {"players": 1},
    "engines": {"dtype": "float32", "device": "cpu"},
}


class Engine:
    def __init__(self, policy: Path) -> None:
        self._version = "r000"
        self._group: Any = None
        self._received: dict[str, torch.Tensor] = load_file(policy / "model.safetensors")
        self._take()

    def _take(self) -> None:
        self._weights = 0
        for name in sorted(self._received):
            self._weights = zlib.crc32(self._received[name].numpy().tobytes(), self._weights)

    def generate(self, prompt_ids: list[int], seed: int) -> Generation:
        draw = zlib.crc32(repr((prompt_ids, seed, self._weights)).encode())
        token_ids = [5 + draw // (7**place) % 900 for place in range(3 + draw % 4)]
        return Generation(token_ids=token_ids, text=str(token_ids), finish_reason="stop", weight_version=self._version)

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        self._group = gloo.gloo_group(
            info["address"], info["port"], info["rank_offset"], info["world_size"], info["timeout_s"]
        )

    def start_weight_update(self) -> None:
        self._received = {}

    def update_weights(self, info: dict[str, Any]) -> None:
        if "checksums" in info:
            assert info["checksums"] == {name: gloo.checksum(self._received[name]) for name in info["checksums"]}
            return
        rows = zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
        specs = [gloo.TensorSpec(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in rows]
        for tensors in gloo.receive_stream(self._group, specs):
            self._received |= dict(tensors)

    def finish_weight_update(self, version: str) -> None:
        self._take()
        self._version = version


class Client:
    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def __call__(self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, key: str) -> Generation:
        generation: Generation = await self._engine.generate.remote(list(prompt_ids), seed)
        return generation

    def engines(self) -> list[Any]:
        return [self._engine]


def job(config: RunConfig, model: Path, folder: Path, client: Client) -> Job:
    chat = ChatFormat.from_pretrained(model, thinking=False)
    prefixes = [
        Prefix(id=f"g{n}/0", trajectory_id=f"g{n}", turn=0, prompt_ids=chat.game_ids(f"Room {n}. Where do you go?"))
        for n in range(STEPS * PER_STEP)
    ]
    texts = [
        KnowledgeText(id=f"k{n}", round=1, seed=n, format="structured", text=text, tokens=0, items=[], steps=[])
        for n, text in enumerate(("- Go left.", "- Never go left. Doors open by themselves."))
    ]
    return Job(
        config=config,
        round=1,
        policy=model,
        teacher=model,
        deployed="r000",
        prefixes=prefixes,
        knowledge=texts,
        plan=[[Draw(step * PER_STEP + n, n % 2) for n in range(PER_STEP)] for step in range(STEPS)],
        generate=client,
        engines=client.engines,
        on_gpu=False,
        metrics=folder / "metrics.jsonl",
        samples=folder / "samples.jsonl",
        target=folder / "policy",
        profile=folder / "profile",
        scratch=folder / "scratch",
    )


def spoilt(steps: Sequence[int]) -> Callable[[dict[str, Any]], None]:
    """What a rank runs: the activations of rank 1's student are NaN in these steps.

    It takes its time over the steps behind them, so that the driver sees what they wrote.
    """
    train = stage._train

    def train_spoilt(settings: dict[str, Any]) -> None:
        from oel_ray.consolidate import worker

        train_step = worker._train_step

        def spoilt_step(job: Job, step: Any, samples: Any, rank: int, world_size: int) -> Any:
            number = int(samples[0].id.removeprefix("g").removesuffix("/0")) // PER_STEP
            time.sleep(2.0 * (number - 1 in steps))
            hook: Any = (lambda _, __, output: output * math.nan) if rank == 1 and number in steps else lambda *_: None
            handle = step.student.get_input_embeddings().register_forward_hook(hook)
            try:
                return train_step(job, step, samples, rank, world_size)
            finally:
                handle.remove()

        worker._train_step = spoilt_step
        train(settings)

    return train_spoilt


def progressed(done: int, text: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        print("progress:", done, text)


def main(model: Path, folder: Path, overrides: Sequence[str]) -> int:
    values = {**SETTINGS, "consolidate": dict(SETTINGS["consolidate"])}
    for key, value in map(parse_override, overrides):
        _set_dotted(values, key, value)
    config = parse_config(values)
    folder.mkdir(exist_ok=True)
    if steps := os.environ.get("SPOILT_STEPS"):
        stage._train = spoilt([int(step) for step in steps.split(",")])
    with ray_cluster(config, folder.name, print):
        engine = ray.remote(max_concurrency=16, num_cpus=1)(Engine).remote(model)
        work = job(config, model, folder, Client(engine))
        try:
            count = stage.consolidate(work, "test", progressed, lambda text: print("note:", text))
        except RunFailed as error:
            print("failed:", error)
            return 1
    print("samples:", count)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
