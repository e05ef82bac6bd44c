"""An engine whose sender of weights died before the end of a sync."""

import asyncio
from typing import Any

import pytest

from oel_ray.engines.engine import Engine
from oel_ray.errors import EngineUnavailable


class Vllm:
    """Does whatever it is told."""

    def __getattr__(self, name: str) -> Any:
        async def agree(*_: Any, **__: Any) -> str:
            return name

        return agree


def test_an_engine_is_unhealthy_until_a_weight_sync_is_finished() -> None:
    engine = Engine.__new__(Engine)
    engine.index, engine._llm = 0, Vllm()
    engine._sync_failed = engine._sync_open = False

    async def sync() -> None:
        await engine.start_weight_update()
        with pytest.raises(EngineUnavailable, match="left in the middle of a weight sync"):
            await engine.check_health()
        await engine.finish_weight_update("r001.s0001.a1")
        await engine.check_health()

    asyncio.run(sync())
