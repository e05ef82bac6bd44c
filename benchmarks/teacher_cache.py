"""What keeping the knowledge saves the teacher: `python -m benchmarks.teacher_cache`. One process; needs no Ray.

Side by side, on the same samples: a pass of the frozen teacher that reads the knowledge anew for every sample, and one
that keeps it. The last line is a JSON object; `ratio` is the first time over the second, and `build_s` what reading the
knowledge costs once a round.
"""

import json
import random
import statistics
import time
from typing import Annotated, Any

import torch
import typer
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import harness
from oel_ray.consolidate.batches import Sample
from oel_ray.consolidate.teacher import Teacher

GOAL = 10.0
PROMPT, RESPONSE, HEAD = 400, 200, 20
VOCABULARY = 1024
ROOM = 2**40
Runs = Annotated[int, typer.Option(min=2)]


def main(samples: int = 32, knowledge: int = 8192, runs: Runs = 2) -> None:
    """Measure with so many samples behind a knowledge text of so many tokens."""
    model = random_model()
    batch = random_samples(samples, knowledge)
    seconds: dict[str, list[float]] = {"reread": [], "kept": [], "build": []}
    for run in range(runs):
        teacher = Teacher(model, device_bytes=ROOM, host_bytes=0)
        started = time.monotonic()
        for sample in batch:
            teacher.reread([sample])
        seconds["reread"].append(time.monotonic() - started)
        started = time.monotonic()
        teacher.hidden(batch)
        first = time.monotonic() - started
        started = time.monotonic()
        teacher.hidden(batch)
        seconds["kept"].append(time.monotonic() - started)
        seconds["build"].append(first - seconds["kept"][-1])
        print(f"run {run}: " + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items()), flush=True)
    ratios = [reread / kept for reread, kept in zip(seconds["reread"], seconds["kept"], strict=True)]
    row = {
        "name": "teacher_cache",
        "ratio": round(statistics.median(ratios), 2),
        "goal": GOAL,
        "spread": round(max(ratios) - min(ratios), 2),
        "runs": runs,
        "machine": harness.machine("cpu"),
        **{f"{name}_s": round(statistics.median(times), 3) for name, times in seconds.items()},
        "samples": samples,
        "knowledge": knowledge,
    }
    print(json.dumps(row))


def random_model() -> Any:
    """Hidden 512, 8 layers, float32, sdpa; the other sizes in Qwen3's proportions."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=40960,
        attn_implementation="sdpa",
    )
    model: Any = Qwen3ForCausalLM(config)
    return model.eval().requires_grad_(False)


def random_samples(count: int, knowledge: int) -> list[Sample]:
    rng = random.Random(0)

    def tokens(number: int) -> list[int]:
        return rng.choices(range(VOCABULARY), k=number)

    head = tokens(HEAD)
    text = (*head, *tokens(knowledge))
    return [Sample(str(n), [*head, *tokens(PROMPT - HEAD)], HEAD, text, tokens(RESPONSE)) for n in range(count)]


if __name__ == "__main__":
    typer.run(main)
