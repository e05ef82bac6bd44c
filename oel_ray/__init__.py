"""oel-ray: Online Experiential Learning (arXiv 2603.16856) on Ray.

Importing this package loads neither torch nor vLLM nor Ray.
"""

import os

__version__ = "0.1.0"

# Ray reads these when it is imported, which any of our modules may do first.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# A killed engine actor takes its EngineCore and Worker processes with it.
os.environ.setdefault("RAY_process_group_cleanup_enabled", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
# It tells ranks that their node will be taken away, which ours do not listen for, and costs a process per attempt.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# Ray refuses a job whose own environment names a variable that `resources` sets for workers as well.
os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
