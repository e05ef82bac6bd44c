"""Makes `tests` and this `oel_ray` importable in every process that a test starts, a Ray worker too."""

import os
from pathlib import Path

_ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
