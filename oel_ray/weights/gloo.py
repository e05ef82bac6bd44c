"""Send weights from the trainer to engines on CPUs: one gloo group, large flat buckets. Both sides import it.

The sender is rank 0; engine workers have the ranks after it. Sender and receiver cut the stream at the same places,
because both cut the same list of (name, dtype, shape) with the same bucket size.
"""

import math
import socket
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import cycle
from typing import Any, cast

import torch
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo, TCPStore

from oel_ray.buckets import buckets

BUCKET_BYTES = 32 * 2**20
"""Small enough that one bucket is loaded while the next one is sent."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one tensor in the stream."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def checksum(tensor: torch.Tensor) -> int:
    """Compute the CRC-32 of a tensor's bytes, on any device."""
    return zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def gloo_group(address: str, port: int, rank: int, world_size: int, timeout_s: float) -> ProcessGroup:
    """Join a gloo group that is independent of the process's default group. Rank 0 hosts the rendezvous.

    Raises:
        RuntimeError, torch.distributed.DistError: not all ranks joined within `timeout_s`.
    """
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    # A torch "backend" has all methods of a group that we need. torch's stubs know neither it nor its options.
    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    options._devices = [gloo.create_device(hostname=_own_address(address))]
    return cast(ProcessGroup, gloo(PrefixStore("oel_ray_weights", store), rank, world_size, options))


def _own_address(peer: str) -> str:
    """Find the address of this machine that `peer` can reach. Gloo would use the host name's, often a loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 1))  # sends nothing
        return str(probe.getsockname()[0])


def broadcast(group: ProcessGroup, flat: torch.Tensor) -> Any:
    """Start the broadcast of one bucket (uint8, 1-D) from rank 0. `wait` of the result returns when it is done.

    `wait` raises if a peer is gone or the group's timeout passes.
    """
    options = torch.distributed.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    return group.broadcast([flat], options)


def send_stream(
    group: ProcessGroup,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    bucket_bytes: int = BUCKET_BYTES,
) -> None:
    """Pack `tensors`, which must come in the order of `specs`, and broadcast bucket after bucket (sender side).

    The next bucket is packed while one is sent.

    Raises:
        ValueError: the stream differs from `specs`.
    """
    stream = iter(tensors)
    runs = list(buckets(specs, lambda spec: spec.nbytes, bucket_bytes))
    largest = max((sum(_sizes(run)) for run in runs), default=0)
    memory = cycle(torch.empty((2, largest), dtype=torch.uint8))
    on_its_way: Any = None
    for run in runs:
        sizes = _sizes(run)
        flat = next(memory)[: sum(sizes)]
        for spec, piece in zip(run, torch.split(flat, sizes), strict=True):
            name, tensor = next(stream, ("nothing", flat[:0]))
            if (name, tensor.dtype, tuple(tensor.shape)) != (spec.name, spec.dtype, spec.shape):
                raise ValueError(f"weights out of order: announced {spec}, got {name} {tensor.dtype} {tensor.shape}")
            piece.copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        if on_its_way:
            on_its_way.wait()
        on_its_way = broadcast(group, flat)
    if on_its_way:
        on_its_way.wait()
    if next(stream, None) is not None:
        raise ValueError("more weights came than were announced")


def receive_stream(
    group: ProcessGroup, specs: Sequence[TensorSpec], bucket_bytes: int = BUCKET_BYTES
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yield the tensors of each bucket, as views into memory of that bucket (receiver side).

    The next bucket is received while one is used.
    """

    def ask(run: list[TensorSpec]) -> tuple[list[TensorSpec], torch.Tensor, Any]:
        flat = torch.empty(sum(_sizes(run)), dtype=torch.uint8)
        return run, flat, broadcast(group, flat)

    coming = map(ask, buckets(specs, lambda spec: spec.nbytes, bucket_bytes))
    this = next(coming, None)
    while this:
        run, flat, work = this
        work.wait()
        this = next(coming, None)
        tensors = []
        for spec, piece in zip(run, torch.split(flat, _sizes(run)), strict=True):
            # Clone the slice, because a view of another dtype needs an aligned start.
            aligned = piece if piece.storage_offset() % spec.dtype.itemsize == 0 else piece.clone()
            tensors.append((spec.name, aligned.view(spec.dtype).view(spec.shape)))
        yield tensors


def _sizes(run: Sequence[TensorSpec]) -> list[int]:
    return [spec.nbytes for spec in run]
