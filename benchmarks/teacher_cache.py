"""`python -m benchmarks.teacher_cache`: wall time of the teacher's pass, reading the knowledge anew / keeping it.

On the same samples, each way after one pass that does not count. Reading anew is done sample by sample, so nothing is
padded. `build_s` is what reading the knowledge costs once a round.
"""

from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks import harness
from benchmarks.models import qwen3_like, random_model, random_samples
from benchmarks.sweep import Benchmark, Case
from oel_ray.distill.teacher import Teacher

_ROOM = 2**40


@dataclass(frozen=True, slots=True)
class TeacherCase(Case):
    """Samples behind one knowledge text, and a model in Qwen3's proportions and float32."""

    samples: int = 32
    knowledge: int = 8192
    prompt: int = 400
    response: int = 200
    width: int = 512
    layers: int = 8
    vocabulary: int = 1024


def _compare(case: TeacherCase, runs: int) -> tuple[harness.Pairs, dict[str, Any]]:
    model = random_model(qwen3_like(case.width, case.layers, case.vocabulary), case.device)
    teacher = Teacher(model.eval().requires_grad_(False), device_bytes=_ROOM, host_bytes=0)
    lengths = {"knowledge": case.knowledge, "prompt": case.prompt, "response": case.response}
    samples = random_samples(case.samples, case.vocabulary, **lengths)

    def reread() -> float:
        return harness.seconds(lambda: [teacher.reread([sample]) for sample in samples], case.device)

    def kept() -> float:
        return harness.seconds(lambda: teacher.hidden(samples), case.device)

    teacher.reread(samples[:1])
    first = kept()
    pairs = harness.measure_pairs(reread, kept, runs)
    return pairs, {"build_s": round(first - median(pairs.below), 3)}


BENCHMARK = Benchmark(
    name="teacher_cache",
    goal=">= 10",
    unit="s",
    above="reread",
    below="kept",
    case=TeacherCase(),
    compare=_compare,
    axes={"knowledge": (0.0625, 0.125, 0.25, 0.5, 1)},
    runs=2,
)

if __name__ == "__main__":
    BENCHMARK.main()
