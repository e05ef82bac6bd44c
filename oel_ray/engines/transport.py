"""The wire between trainer and engines on CPUs: one gloo group, weights in large flat buckets. Both sides import it.

Sender is rank 0; engine workers follow. Sender and receiver cut the stream at the same places because both cut the
same list of (name, dtype, shape) with the same bucket size.
"""

import math
import socket
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo, TCPStore

from oel_ray.buckets import buckets

BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor looks like on the wire."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes, wherever it lies."""
    return zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def gloo_group(address: str, port: int, rank: int, world_size: int, timeout_s: float) -> ProcessGroup:
    """Join a gloo group that is independent of the process's default group. Rank 0 hosts the rendezvous.

    Raises:
        RuntimeError, torch.distributed.DistError: not everybody came within `timeout_s`.
    """
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    # A torch "backend", with all methods of a group that we need; torch's stubs know neither that nor its options.
    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    options._devices = [gloo.create_device(hostname=_own_address(address))]
    return cast(ProcessGroup, gloo(PrefixStore("oel_ray_weights", store), rank, world_size, options))


def _own_address(peer: str) -> str:
    """The address of this machine that `peer` can reach. Gloo's own choice, the host name's, often is a loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 1))  # sends nothing
        return str(probe.getsockname()[0])


def broadcast(group: ProcessGroup, flat: torch.Tensor) -> None:
    """Broadcast one bucket (uint8, 1-D) from rank 0; raises when a peer is gone or the group's timeout passes."""
    options = torch.distributed.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([flat], options).wait()


def send_stream(
    group: ProcessGroup,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    bucket_bytes: int = BUCKET_BYTES,
) -> None:
    """Sender side: pack `tensors`, which must come in the order of `specs`, and broadcast bucket after bucket.

    Raises:
        ValueError: the stream differs from `specs`.
    """
    stream = iter(tensors)
    for run in buckets(specs, lambda spec: spec.nbytes, bucket_bytes):
        flat, pieces = _bucket(run)
        for spec, piece in zip(run, pieces, strict=True):
            name, tensor = next(stream, ("nothing", flat[:0]))
            if (name, tensor.dtype, tuple(tensor.shape)) != (spec.name, spec.dtype, spec.shape):
                raise ValueError(f"weights out of order: announced {spec}, got {name} {tensor.dtype} {tensor.shape}")
            piece.copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        broadcast(group, flat)
    if next(stream, None) is not None:
        raise ValueError("more weights came than were announced")


def receive_stream(
    group: ProcessGroup, specs: Sequence[TensorSpec], bucket_bytes: int = BUCKET_BYTES
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Receiver side: the tensors of each bucket, as views into memory of their own."""
    for run in buckets(specs, lambda spec: spec.nbytes, bucket_bytes):
        flat, pieces = _bucket(run)
        broadcast(group, flat)
        tensors = []
        for spec, piece in zip(run, pieces, strict=True):
            # A view of another dtype needs an aligned start; a clone of the slice always has one.
            aligned = piece if piece.storage_offset() % spec.dtype.itemsize == 0 else piece.clone()
            tensors.append((spec.name, aligned.view(spec.dtype).view(spec.shape)))
        yield tensors


def _bucket(run: Sequence[TensorSpec]) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Memory for the tensors of a bucket, as a whole and as the bytes of each."""
    sizes = [spec.nbytes for spec in run]
    flat = torch.empty(sum(sizes), dtype=torch.uint8)
    return flat, torch.split(flat, sizes)
