"""Put on the path as `sitecustomize` by a test: engines take the version of new weights and keep the old weights."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

ENGINE, SYNC = "oel_ray.engines.engine", "oel_ray.weights.sync"


class Patcher(importlib.abc.MetaPathFinder):
    """Changes the two modules right behind their own code."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in {ENGINE, SYNC}:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec
        assert spec.loader
        run = spec.loader.exec_module

        def run_and_patch(module: ModuleType) -> None:
            run(module)
            (patch_engine if name == ENGINE else patch_sync)(module)

        spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]
        return spec


def patch_engine(module: Any) -> None:
    async def ignore(self: Any, *_: Any) -> None:
        pass

    async def take_version(self: Any, version: str) -> None:
        await self._llm.update_weight_version(version)

    module.Engine.start_weight_update = module.Engine.update_weights = ignore
    module.Engine.finish_weight_update = take_version


def patch_sync(module: Any) -> None:
    def send(self: Any, version: str) -> None:
        for _ in self._weights:
            pass
        if self._sender is not None:
            self._client.finish_weight_update(version)

    module.WeightSync.send = send


sys.meta_path.insert(0, Patcher())
