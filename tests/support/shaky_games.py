"""Games that go wrong where they are told to. Registered by `test_stage`."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from oel_ray.envs import Step


class Shaky:
    """Over after two answers. Seeds in `params[manner]` do so at the first answer of their first `times` games."""

    actions = ("[go]",)

    def __init__(self, seed: int, params: dict[str, Any]) -> None:
        self.instructions, self.map_hash = "Go on.", str(seed)
        self._answers = 0
        self._mark = Path(params["marks"]) / str(seed)
        self._times = params.get("times", 1)
        self._manner = next((name for name, seeds in params.items() if isinstance(seeds, list) and seed in seeds), "")

    def reset(self) -> str:
        return "A road."

    def step(self, response: str) -> Step:
        self._answers += 1
        if self._answers == 1:
            with self._mark.open("a") as file:
                file.write("x")
            if len(self._mark.read_text()) <= self._times:
                self._fail()
        done = self._answers == 2
        return Step("[go]", "The road goes on.", done, "You are there." if done else "")

    def _fail(self) -> None:
        match self._manner:
            case "raises":
                raise ValueError(f"no road\nat {self.map_hash}")
            case "exits":
                sys.exit("enough")
            case "dies":
                os._exit(1)
            case "hangs":
                time.sleep(10_000)

    def success(self) -> bool:
        return self._answers == 2

    def solution(self) -> list[str]:
        return ["[go]", "[go]"]
