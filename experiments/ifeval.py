"""`python -m experiments.ifeval MODEL`: prompt-level strict accuracy on IF-Eval, by lm-evaluation-harness.

Run as a script, in a process of its own. Needs the package lm_eval with the extras of its back end and of the task, and
the task's data, which it fetches from the hub.
"""

import argparse
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.measure import Measured
from oel_ray.errors import UserError
from oel_ray.runs.files import write_json

TASK, METRIC = "ifeval", "prompt_level_strict_acc"
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}
SEED = 42
MEMORY = {"cuda": 0.9, "cpu": 0.2}
"""Share of the device's memory that vLLM takes. On a CPU that is the machine's, which others use as well."""


def arguments(folder: Path, backend: str, device: str, task: str, seed: int) -> dict[str, Any]:
    """How the harness is called, as the paper's authors do: sampled, with the chat template, without thinking.

    To vLLM all prompts at once: by itself the harness gives an engine one after the other. transformers gets a few at a
    time, since the harness would look for the largest batch with ones of hundreds, minutes each on a CPU.
    """
    model: dict[str, Any] = {"pretrained": str(folder), "enable_thinking": False}
    if backend == "vllm":
        model |= {"seed": seed, "gpu_memory_utilization": MEMORY[device]}
    return {
        "model": backend,
        "model_args": model,
        "device": device,
        "tasks": [task],
        "batch_size": "auto" if backend == "vllm" else 16,
        "apply_chat_template": True,
        "gen_kwargs": SAMPLING,
        "random_seed": seed,
        "numpy_random_seed": seed,
        "torch_random_seed": seed,
        "log_samples": False,
    }


def measured(results: Mapping[str, Any], task: str) -> Measured:
    """What a result of the harness says of a task.

    Raises:
        UserError: it has no such metric.
    """
    scores = results["results"].get(task, {})
    if f"{METRIC},none" not in scores:
        raise UserError(f"the task {task} gave no {METRIC}: it must report that metric, as ifeval does")
    return Measured(
        rate=scores[f"{METRIC},none"],
        error=scores[f"{METRIC}_stderr,none"],
        count=results["n-samples"][task]["effective"],
    )


def check_installed() -> None:
    """Raises `UserError` where the harness is not."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("IF-Eval needs lm-evaluation-harness: pip install 'lm_eval[vllm,ifeval]'")


def measure(folder: Path, backend: str, task: str, tasks_in: Path | None, seed: int) -> Measured:
    """Have the harness measure a model folder.

    Raises:
        UserError: the harness is not installed, or the task has another metric.
    """
    check_installed()
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks_in) if tasks_in else None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    called = arguments(folder, backend, device, task, seed)
    return measured(lm_eval.simple_evaluate(**called, task_manager=manager), task)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.ifeval", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--backend", choices=["vllm", "hf"], default="vllm", help="what the harness generates with")
    parser.add_argument("--task", default=TASK, help="another task with the same metric")
    parser.add_argument("--tasks-in", type=Path, help="a folder with the YAML files of other tasks")
    parser.add_argument("--seed", type=int, default=SEED, help="of responses; the paper has this one alone")
    options = parser.parse_args()
    try:
        it = measure(options.model, options.backend, options.task, options.tasks_in, options.seed)
    except UserError as error:
        sys.exit(f"experiments: {error}")
    write_json(options.out, it.model_dump())


if __name__ == "__main__":
    main()
