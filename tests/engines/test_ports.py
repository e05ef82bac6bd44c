"""Where vLLM looks for the ports of an engine, and what is done about one that somebody else was quicker to bind."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.engine.async_llm import AsyncLLM

from oel_ray.config.schema import EnginesConfig
from oel_ray.engines.engine import Engine
from oel_ray.errors import RunFailed

pytestmark = pytest.mark.vllm

TAKEN = "DistNetworkError: the server socket has failed to listen. code: -98, name: EADDRINUSE, address already in use"


def start(tmp_path: Path, failures: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first ports that vLLM was told, if so many of its starts fail."""
    ports: list[int] = []

    def from_engine_args(args: Any, **_: Any) -> object:
        ports.append(int(os.environ["VLLM_PORT"]))
        if len(ports) <= failures:
            raise RuntimeError(TAKEN)
        return object()

    for name in (
        "VLLM_PORT",
        "TORCH_COMPILE_DISABLE",
        "LD_PRELOAD",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "OMP_NUM_THREADS",
    ):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(AsyncLLM, "from_engine_args", from_engine_args)
    asyncio.run(Engine(0, EnginesConfig(device="cpu", dtype="float32"), str(tmp_path), on_gpu=False).start())
    return ports


def test_an_engine_whose_port_is_taken_starts_on_another_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = start(tmp_path, 2, monkeypatch)
    assert len(set(ports)) == 3 and all(20_000 <= port < 32_000 for port in ports)
    assert min(abs(one - other) for one in ports for other in ports if one != other) >= 20


def test_an_engine_that_finds_no_free_port_fails_with_that_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunFailed, match=r"^engine 0 did not start: .*address already in use"):
        start(tmp_path, 3, monkeypatch)
