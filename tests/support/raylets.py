"""A Ray cluster of several raylets on this machine, for tests; its head has no CPUs."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import oel_ray.cluster.session  # noqa: F401 - sets what Ray reads when it is imported

import ray  # isort: skip
from ray.cluster_utils import Cluster

SOON = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
"""A node counts as dead after about two seconds, and not after half a minute."""


@contextmanager
def raylets(*nodes: dict[str, Any], connect: bool = True) -> Iterator[Cluster]:
    """`nodes`: what those beside the head have, as arguments of Ray's `add_node`."""
    # Short, for sockets lie in it; of its own, for other drivers look for a cluster in the usual one.
    folders = tempfile.TemporaryDirectory(prefix="oel", ignore_cleanup_errors=True)
    with folders as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": SOON}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for node in nodes:
                cluster.add_node(**node)
            if connect:
                path = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
                ray.init(cluster.address, runtime_env=path, log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
