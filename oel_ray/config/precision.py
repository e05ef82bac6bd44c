"""Choose the precision for `auto`. Runs in the driver, and as a task on the nodes of a cluster.

Imports nothing heavy.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from oel_ray.config.schema import RunConfig
from oel_ray.records import Record

BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16")
"""Flags of processors that multiply bfloat16 matrices by themselves. On others torch is 10 to 80 times slower in
bfloat16 than in float32."""
_CPUINFO = Path("/proc/cpuinfo")
_ONEDNN_LIMIT = "ONEDNN_MAX_CPU_ISA"
_BELOW_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


class Auto(Record):
    """The precision that a run uses for `auto`, and the reason."""

    precision: Literal["bfloat16", "float32"]
    because: str

    def __str__(self) -> str:
        return f"{self.precision}, because {self.because}"


def bfloat16_units() -> list[str]:
    """Name this processor's bfloat16 instructions; none if oneDNN's environment variable forbids them."""
    if os.environ.get(_ONEDNN_LIMIT, "").upper() in _BELOW_BFLOAT16:
        return []
    try:
        flags = _CPUINFO.read_text().split()
    except OSError:
        return []
    return [unit for unit in BFLOAT16_UNITS if unit in flags]


def auto_here() -> Auto:
    """Choose the precision of engines and trainer on this machine's processor."""
    if units := bfloat16_units():
        return Auto(precision="bfloat16", because=f"this processor has {units[0]}")
    return Auto(precision="float32", because=f"this processor has neither {' nor '.join(BFLOAT16_UNITS)}")


def auto_on_nodes(lacking: Sequence[str], nodes: int) -> Auto:
    """Choose the precision on the processors of a cluster; `lacking` are the nodes without bfloat16 instructions."""
    if lacking:
        return Auto(
            precision="float32",
            because=f"{len(lacking)} of {nodes} nodes have neither {' nor '.join(BFLOAT16_UNITS)}, e.g. {lacking[0]}",
        )
    return Auto(precision="bfloat16", because=f"the processors of all {nodes} nodes have instructions for it")


def precisions(config: RunConfig) -> dict[str, str]:
    """List the precisions of engines, trainer and written policies, by their configuration keys."""
    return {
        "engines.dtype": config.engines.dtype,
        "consolidate.precision": config.consolidate.precision,
        "policy_dtype": config.policy_dtype,
    }
