"""The KV cache: allocated once, rewound instead of rebuilt, forked so that answers share one prefix.

A layer is one buffer [prefix | room]. Unforked, new keys are written after the prefix. Forked, each
fork has a small private tail, copied into the room after the prefix before the fork attends. So
attention always sees one contiguous (1, Hkv, N, D) view, and the prefix is never copied.

Layers with a sliding window keep all keys too, so that rewinding is exact; attention applies the window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class SharedPrefixLayer(DynamicLayer):
    """One layer's keys and values, (1, Hkv, capacity, D). Lengths are in tokens."""

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.length = 0  # tokens that all forks share
        self.forks = 0  # 0 = not forked
        self.tail_length = 0  # tokens of each fork after the shared ones
        self._buffers: list[Tensor] = []  # keys and values
        self._tails: list[Tensor] = []  # keys and values (forks, Hkv, tail capacity, D)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [t.new_empty((1, t.shape[1], self.capacity, t.shape[3])) for t in (key_states, value_states)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (rows, Hkv, Q, D). Unforked: rows = 1, returns views of all keys and values.
        Forked: one row per fork, returns its arguments; attention calls `view` for each fork in turn."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, added = key_states.shape[0], key_states.shape[2]
        if rows != max(1, self.forks):
            raise ValueError(f"the cache serves {max(1, self.forks)} rows but got {rows}")
        if self.get_seq_length() + added > self.capacity:
            raise ValueError(
                f"the cache has room for {self.capacity} tokens, holds {self.get_seq_length()} and got {added} more: "
                "prefill with more room"
            )
        held = self.tail_length if self.forks else self.length
        for target, new in zip(self._tails if self.forks else self._buffers, (key_states, value_states), strict=True):
            target[:, :, held : held + added] = new
        if self.forks:
            self.tail_length += added
            return key_states, value_states
        self.length += added
        self.keys, self.values = self.view(0)
        return self.keys, self.values

    def view(self, fork: int) -> tuple[Tensor, Tensor]:
        """Keys and values (1, Hkv, N, D) of one fork, shared prefix and own tail, valid until the next call of `view`."""
        total = self.get_seq_length()
        for buffer, tail in zip(self._buffers, self._tails, strict=False):  # unforked, there are no tails
            buffer[0, :, self.length : total] = tail[fork, :, : self.tail_length]
        keys, values = (buffer[:, :, :total] for buffer in self._buffers)
        return keys, values

    def fork(self, forks: int, tail_capacity: int) -> None:
        """Continue with `forks` independent rows, for at most tail_capacity tokens each; 0 drops all forks."""
        self.forks, self.tail_length = forks, 0
        # Made for all layers at once and early: between the large temporary tensors of attention they would fragment the heap.
        self._tails = [
            buffer.new_empty((forks, buffer.shape[1], tail_capacity, buffer.shape[3])) for buffer in self._buffers if forks
        ]

    def select(self, forks: list[int], index: Tensor) -> None:
        """Keep only these forks, in this order; `index` is the same list as a tensor on this layer's device."""
        self._tails = [tail.index_select(0, index) for tail in self._tails]
        self.forks = len(forks)

    def rewind(self, length: int) -> None:
        """Drop all forks and every token from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length} tokens: the shared prefix has {self.length}")
        self.fork(0, 0)
        self.length = length
        if self.is_initialized:
            self.keys, self.values = self.view(0)

    # Methods that transformers calls.

    def get_seq_length(self) -> int:
        return self.length + self.tail_length

    def get_max_length(self) -> int:
        return self.capacity

    def crop(self, tokens_to_remove: int) -> None:
        """Remove -tokens_to_remove tokens (a negative number, as transformers has it) of an unforked cache."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the negative number of tokens to remove, got {tokens_to_remove}")
        self.rewind(self.length + tokens_to_remove)

    def reset(self) -> None:
        self.rewind(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ValueError("a shared-prefix cache has no beams: search with transformers' own DynamicCache")


class SharedPrefixCache(Cache):
    """One SharedPrefixLayer per model layer."""

    layers: list[SharedPrefixLayer]  # type: ignore[assignment]

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[SharedPrefixLayer(capacity) for _ in range(num_layers)])

    def fork(self, forks: int, tail_capacity: int) -> None:
        """Continue with `forks` rows of at most tail_capacity tokens; one row needs no private tail."""
        if forks > 1:
            for layer in self.layers:
                layer.fork(forks, tail_capacity)

    def select(self, forks: list[int]) -> None:
        """Keep only these forks (their indices in the current batch), in this order."""
        initialized = [layer for layer in self.layers if layer.is_initialized]
        indices = {device: torch.tensor(forks, device=device) for device in {layer.device for layer in initialized}}
        for layer in initialized:
            layer.select(forks, indices[layer.device])

    def rewind(self, length: int) -> None:
        for layer in self.layers:
            layer.rewind(length)

    def nbytes(self) -> int:
        """Bytes held by the buffers, without the tails."""
        return sum(buffer.nbytes for layer in self.layers for buffer in layer._buffers)
