"""The wire: what leaves the sender arrives at every receiver, bit for bit."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from oel_ray.engines.startup import StartLog
from oel_ray.models.folder import checkpoint_shapes, checkpoint_tensors
from oel_ray.weights import gloo
from oel_ray.weights.gloo import TensorSpec, gloo_group, receive_stream, send_stream
from oel_ray.weights.receive import CheckedReceiver, NcclReceiver, UpdateInfo
from oel_ray.weights.send import NamedTensors, _alongside

pytestmark = pytest.mark.vllm

Named = list[tuple[str, torch.Tensor]]


def specs(tensors: Named) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]


def groups(count: int) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ThreadPoolExecutor(count) as side:
        return list(side.map(lambda rank: gloo_group("127.0.0.1", port, rank, count, 20.0), range(count)))


def odd_tensors() -> Named:
    torch.manual_seed(0)
    return [
        ("bytes", torch.randint(0, 255, (3,), dtype=torch.uint8)),
        ("odd bfloat16", torch.randn(7, 3).bfloat16()),  # begins at byte 3
        ("float32", torch.randn(5)),  # begins at byte 45
        ("scalar", torch.tensor(2.5)),
        ("empty", torch.empty(0, 4)),
        ("turned", torch.randn(4, 6).T),
        ("parameter", torch.nn.Parameter(torch.randn(2, 2))),
        ("nan", torch.tensor([float("nan"), float("inf"), -0.0]).bfloat16()),
        ("large", torch.randn(1000).double()),
    ]


@pytest.mark.parametrize("bucket_bytes", [1, 64, 2**20])
def test_two_receivers_get_every_bit(bucket_bytes: int) -> None:
    tensors = odd_tensors()
    sender, *receivers = groups(3)

    def receive(group: Any) -> Named:
        return [row for run in receive_stream(group, specs(tensors), bucket_bytes) for row in run]

    with ThreadPoolExecutor(2) as side:
        received = [side.submit(receive, group) for group in receivers]
        send_stream(sender, specs(tensors), tensors, bucket_bytes)
        for result in received:
            for (name, got), (expected_name, expected) in zip(result.result(20), tensors, strict=True):
                assert (name, got.dtype, got.shape) == (expected_name, expected.dtype, expected.shape)
                as_bytes = expected.detach().contiguous().view(-1).view(torch.uint8)
                assert torch.equal(got.contiguous().view(-1).view(torch.uint8), as_bytes)


def test_a_stream_that_differs_from_what_was_announced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo, "broadcast", lambda group, flat: None)
    a, b = ("a", torch.zeros(2)), ("b", torch.zeros(2))
    announced = specs([a, b])
    for stream in ([b, a], [a], [], [a, ("b", torch.zeros(3))], [a, ("b", torch.zeros(2).bfloat16())]):
        with pytest.raises(ValueError, match="weights out of order: announced"):
            send_stream(None, announced, stream)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="more weights came"):
        send_stream(None, announced, [a, b, a])  # type: ignore[arg-type]


def test_if_both_sides_of_a_sync_fail_the_error_of_the_engine_is_raised() -> None:
    def engines_fail(info: dict[str, Any]) -> None:
        raise ValueError(f"cannot load {info['names']}")

    def lose_connection() -> None:
        time.sleep(0.2)
        raise RuntimeError("connection closed by peer")

    with pytest.raises(ValueError, match="cannot load few"), _alongside(engines_fail, {"names": "few"}):
        lose_connection()
    with pytest.raises(ValueError, match="cannot load few"), _alongside(engines_fail, {"names": "few"}):
        pass
    with pytest.raises(RuntimeError, match="closed"), _alongside(lambda info: None, {}):
        lose_connection()


def test_the_receiver_on_gpus_adds_our_checks_to_the_nccl_transfer_of_vllm() -> None:
    for step in ("start_weight_update", "receive_weights", "finish_weight_update"):
        assert getattr(NcclReceiver, step) is getattr(CheckedReceiver, step)
    for step in ("init_transfer_engine", "shutdown"):
        assert getattr(NcclReceiver, step) is getattr(NCCLWeightTransferEngine, step)


class Sent:
    """Weights as a trainer has them."""

    def __init__(self, tensors: Named) -> None:
        self._tensors = tensors

    def metadata(self) -> list[Any]:
        return [(name, tensor.dtype, tensor.shape) for name, tensor in self._tensors]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._tensors)


def test_a_sender_keeps_checksums_of_a_few_tensors_or_of_all() -> None:
    tensors = [(f"layer.{n}", torch.full((3,), float(n))) for n in range(40)]
    few, every = NamedTensors(Sent(tensors)), NamedTensors(Sent(tensors), "all")
    seen = set()
    for _ in range(5):
        assert [name for name, _ in few] == [name for name, _ in tensors]
        assert len(few.checksums) == 8
        seen |= few.checksums.keys()
    assert len(seen) > 8, "not always the same ones"
    assert dict(every).keys() == every.checksums.keys()
    assert len(set(every.checksums.values())) == 40
    assert few.checksums.items() <= every.checksums.items()


@pytest.mark.parametrize("broken", ["", "norm.weight", "embed.weight"])
def test_what_a_model_holds_is_compared_with_what_was_sent(broken: str) -> None:
    sent = {
        "norm.weight": torch.randn(8),
        "embed.weight": torch.randn(10, 8),  # the engine pads it
        "q_proj.weight": torch.randn(8, 8),  # the engine fuses it
        "down.weight": torch.randn(8, 4),  # the engine has a part of it
        "head.weight": torch.randn(10, 8),  # the engine has it in less precision
    }
    model = torch.nn.Module()
    held = {
        "norm": sent["norm.weight"].clone(),
        "embed": torch.cat([sent["embed.weight"], torch.zeros(6, 8)]),
        "down": sent["down.weight"][:, :2],
        "head": sent["head.weight"].bfloat16(),
    }
    for name, tensor in held.items():
        model.add_module(name, torch.nn.Module())
        model.get_submodule(name).register_parameter("weight", torch.nn.Parameter(tensor))
    receiver: Any = NcclReceiver.__new__(NcclReceiver)
    receiver.model = model
    receiver._received = {name: tuple(tensor.shape) for name, tensor in sent.items()}
    receiver._dtypes = {name: tensor.dtype for name, tensor in sent.items()}
    receiver.receive_weights(UpdateInfo(checksums={name: gloo.checksum(tensor) for name, tensor in sent.items()}))
    if broken:
        model.get_parameter(broken).data[0].add_(1.0)
        with pytest.raises(RuntimeError, match=f"does not hold what was sent: {broken} differs"):
            receiver.check_sums()
    else:
        receiver.check_sums()


def test_a_group_meets_at_the_address_that_the_peer_can_reach() -> None:
    assert gloo._own_address("127.0.0.1") == "127.0.0.1"


def test_only_files_in_the_index_of_a_checkpoint_are_read_if_there_is_one(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "scalar": torch.tensor(1.0)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(5).bfloat16()}, tmp_path / "model-2.safetensors")
    assert checkpoint_shapes(tmp_path) == {"a": (2, 3), "scalar": (), "b": (5,)}
    save_file({"the same": torch.zeros(9)}, tmp_path / "consolidated.safetensors")
    weight_map = {"a": "model-1.safetensors", "scalar": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert checkpoint_shapes(str(tmp_path)) == {"a": (2, 3), "scalar": (), "b": (5,)}
    assert {name: tuple(tensor.shape) for name, tensor in checkpoint_tensors(tmp_path)} == checkpoint_shapes(tmp_path)


def test_the_cause_of_a_failed_start_is_the_first_error_that_a_vllm_process_logged(
    capfd: pytest.CaptureFixture[str],
) -> None:
    vague = RuntimeError("Engine core initialization failed. See root cause above.")
    print("(Worker pid=1) ERROR 11-22 16:18:05 [old.py:1] KeyError: of an earlier start", flush=True)
    log = StartLog()
    assert log.cause(vague) == "RuntimeError: Engine core initialization failed. See root cause above."
    print("(Worker pid=2) WARNING 11-22 16:18:05 [a.py:1] ValueError: harmless", flush=True)
    print("(Worker pid=2) ERROR 11-22 16:18:05 [a.py:1] WorkerProc hit an exception.", flush=True)
    print("(Worker pid=2) ERROR 11-22 16:18:05 [a.py:1] torch.OutOfMemoryError: no memory", flush=True)
    print("(EngineCore pid=3) ERROR 11-22 16:18:05 [b.py:1] RuntimeError: Worker failed", flush=True)
    assert log.cause(vague) == "torch.OutOfMemoryError: no memory"
    del capfd
