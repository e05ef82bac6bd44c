"""`python -m benchmarks.sync`: wall time of a weight sync / loading the same tensors where they already are.

A sync is drain, update, check, reset, version, serve, sent by this process as training rank 0 sends it. Below it stands
`load_weights` in the engine's own worker, of tensors in its memory, with nothing before or behind it. The model has
random weights; by default it is of SmolLM2-135M's shape. `calls` counts what an engine is called for in a sync; that it
does not depend on the number of tensors is checked with half of the layers. The last line is one JSON object.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import harness, serving
from benchmarks.counted import CountedEngine
from oel_ray.config.schema import RunConfig
from oel_ray.models.folder import checkpoint_tensors
from oel_ray.models.resolve import MICRO, resolve_model
from oel_ray.weights.sync import WeightSync

import ray  # isort: skip - behind what sets its environment

GOAL = "<= 1.5"
SIZE = ["engines.count=1", "engines.max_model_len=2048"]
SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SMALL = {"vocab_size": 1024, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3}


class Held:
    """A folder's weights, in this process's memory, as a training rank has them."""

    def __init__(self, folder: Path) -> None:
        self._tensors = [(name, tensor.clone()) for name, tensor in checkpoint_tensors(folder)]

    def metadata(self) -> list[Any]:
        return [(name, tensor.dtype, tensor.shape) for name, tensor in self._tensors]

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self._tensors)


def random_policy(folder: Path, shape: dict[str, Any]) -> Path:
    """A policy of random weights with the micro model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MICRO, serving.tell))
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=tokenizer.eos_token_id))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(config: RunConfig, shape: dict[str, Any], runs: int) -> dict[str, Any]:
    """The benchmark's result.

    Raises:
        RuntimeError: a sync of fewer tensors took another number of calls.
    """
    half = shape | {"num_hidden_layers": shape["num_hidden_layers"] // 2}
    calls = syncs(config, half, 1)["calls"]
    whole = syncs(config, shape, runs)
    if calls != whole["calls"]:
        raise RuntimeError(f"{calls} calls for half of the layers and {whole['calls']} for all of them")
    pairs: harness.Pairs = whole.pop("pairs")
    return harness.result(
        "sync",
        pairs,
        GOAL,
        whole.pop("machine"),
        unit="s",
        **pairs.medians("sync", "load_weights", digits=4),
        engines=config.engines.count,
        **whole,
    )


def syncs(config: RunConfig, shape: dict[str, Any], runs: int) -> dict[str, Any]:
    """Both ways for a model of some shape, after one of each that does not count."""
    with tempfile.TemporaryDirectory() as folder:
        policy = random_policy(Path(folder), shape)
        config = config.model_copy(update={"model": str(policy)})
        weights = Held(policy)
        with serving.serving(config, engine=CountedEngine) as served:
            engines = served.pool.engines()
            sync = WeightSync(engines, weights, config.engines, rank=0, on_gpu=served.on_gpu)

            def send() -> float:
                return harness.seconds(lambda: sync.send(serving.VERSION), "cpu")

            def load() -> float:
                return float(max(ray.get([engine.load_again.remote(str(policy)) for engine in engines])))

            send()
            load()
            before: int = ray.get(engines[0].calls.remote())
            pairs = harness.measure_pairs(send, load, runs)
            calls = (ray.get(engines[0].calls.remote()) - before) / runs
    machine = harness.machine(served.device)
    return {"pairs": pairs, "calls": calls, "tensors": len(weights), "bytes": weights.nbytes, "machine": machine}


def main() -> None:
    options = serving.arguments("sync", __doc__, runs=7).parse_args()
    shape = SHAPE | (SMALL if options.small else {})
    print(json.dumps(measure(serving.quickstart(*SIZE, *options.settings), shape, options.runs)))


if __name__ == "__main__":
    main()
