"""Keep the key/value caches of the texts that the teacher has read, on the device or on the host. Training workers (Ray
Train group); needs no Ray itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cachetools import LRUCache
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

Text = tuple[int, ...]
"""Token ids that prompts begin with."""


@dataclass(frozen=True, slots=True)
class TextCache:
    """Keys and values of every layer, each [1, heads, tokens of the text, head width]. Nobody writes to them."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def moved(self, move: Callable[[Tensor], Tensor]) -> "TextCache":
        return TextCache(tuple((move(keys), move(values)) for keys, values in self.layers))

    def as_past(self) -> Cache:
        """Build the cache argument of one forward pass over tokens after the text."""
        return Cache(layers=[_FixedLayer(keys, values) for keys, values in self.layers])


class _FixedLayer(DynamicLayer):
    """Append a pass's own keys and values to the kept ones, for that pass alone."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def _host_copy(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    # Page-locked, because loading a cache back would otherwise take as long as re-encoding the text.
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


@dataclass(slots=True)
class CacheCounts:
    """How often a text was wanted and found on the device, brought back from the host or read; and sent to the host."""

    hits: int = 0
    loads: int = 0
    builds: int = 0
    offloads: int = 0


class TextCaches:
    """The caches of one rank within two budgets: on the device, else on the host, else the text is read again.

    The least recently used goes first. What lies on the host stays there when it is brought back, so that a text is
    copied once. Where the device is a CPU, the two are one memory with both budgets.
    """

    def __init__(
        self, read: Callable[[Text], TextCache], device: torch.device, device_bytes: float, host_bytes: float
    ) -> None:
        self.counts = CacheCounts()
        self._read = read
        self._device = device
        self._device_bytes = device_bytes
        self._host_bytes = host_bytes
        # Without a limit of their own: what is put in may be too large, and what goes from the device is not lost.
        self._on_device: LRUCache[Text, TextCache] = LRUCache(math.inf, _size)
        self._on_host: LRUCache[Text, TextCache] = LRUCache(math.inf, _size)
        self._bytes_per_token = 0  # known from the first text on

    @property
    def device_size(self) -> int:
        """Bytes of the caches on the device."""
        return int(self._on_device.currsize)

    def distance(self, text: Text) -> int:
        """Return 0 for a text on the device, 1 on the host, 2 for neither. Use near texts first, because those stay."""
        return 0 if text in self._on_device else 1 if text in self._on_host else 2

    def get(self, text: Text) -> TextCache:
        """The text's cache on the device. It may be larger than the budget: `make_room` when done with it."""
        if text in self._on_device:
            self.counts.hits += 1
            cache = self._on_device[text]
        elif text in self._on_host:
            self.counts.loads += 1
            kept = self._on_host[text]
            self.make_room(kept.size)
            cache = kept.moved(lambda tensor: tensor.to(self._device, non_blocking=True))
        else:
            self.counts.builds += 1
            self.make_room(self._bytes_per_token * len(text))
            cache = self._read(text)
            self._bytes_per_token = cache.size // len(text)
        self._on_device[text] = cache
        return cache

    def make_room(self, needed: int = 0) -> None:
        """Offload caches until the device's budget has `needed` bytes free."""
        while self._on_device and self._on_device.currsize + needed > self._device_bytes:
            self._offload(*self._on_device.popitem())

    def clear(self) -> None:
        """Forget all texts: the model that read them has other weights now."""
        self._on_device.clear()
        self._on_host.clear()

    def _offload(self, text: Text, cache: TextCache) -> None:
        if text in self._on_host or cache.size > self._host_bytes:
            return
        while self._on_host.currsize + cache.size > self._host_bytes:
            self._on_host.popitem()
        self.counts.offloads += 1
        self._on_host[text] = cache.moved(_host_copy)


def _size(cache: TextCache) -> int:
    return cache.size
