"""`oel` as it is, whose stages write made-up files at once instead of starting Ray: `oel_without_ray.py ARGUMENTS`."""

import shutil
from collections.abc import Sequence

from oel_ray import loop
from oel_ray.cli.main import main
from oel_ray.config.schema import RunConfig
from oel_ray.models.resolve import MICRO, resolve_model
from oel_ray.runs import layout
from oel_ray.runs.folder import RunFolder
from oel_ray.runs.stage import Stage
from oel_ray.telemetry.progress import Progress
from tests.support import example_run


def consolidate(stage: Stage, kept: Sequence[int]) -> None:
    """Every policy is the micro model."""
    out = stage.begin()
    policies = [out.policy, *map(out.policy_after, kept)]
    for folder in policies:
        shutil.copytree(resolve_model(MICRO, print), folder, dirs_exist_ok=True)
    out.consolidation_metrics.write_bytes(b'{"step": 0, "kl_per_token": 0.5}\n')
    stage.commit([out.consolidation_metrics, *policies], {"metrics": 1})


def work(config: RunConfig, folder: RunFolder, progress: Progress, todo: Sequence[tuple[int, str]]) -> None:
    for number, name in todo:
        stage = Stage(folder, number, name)
        if name == layout.CONSOLIDATE:
            consolidate(stage, config.consolidate.keep_steps)
        else:
            example_run.STAGES[name](stage)


if __name__ == "__main__":
    loop.work = work
    main()
