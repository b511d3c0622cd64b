"""The KV cache: allocated once, rewound instead of rebuilt, forked so that many answers share one prefix.

A layer is one buffer [prefix | room]. Unforked, new keys are written after the prefix. Forked, each fork has a small
private tail; before a fork attends, its tail is copied into the room after the prefix, so that attention always sees
one contiguous (1, Hkv, N, D) view, whatever the number of forks, and the prefix is never copied.

Layers with a sliding window keep all keys too: rewinding is then exact, and the window is applied by attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_NO_OWNER = -1


class SharedPrefixLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values, (1, Hkv, capacity, D). Lengths are in tokens."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.length = 0  # tokens that all forks share
        self.forks = 0  # 0 = not forked
        self.tail_length = 0  # tokens of each fork after the shared ones
        self._tail_capacity = 0
        self._tail_keys: Tensor | None = None
        self._tail_values: Tensor | None = None
        self._owner = _NO_OWNER  # the fork whose tail lies in the buffer
        self._owned = 0  # how many tokens of that tail

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys = key_states.new_empty((1, key_states.shape[1], self.capacity, key_states.shape[3]))
        self._values = value_states.new_empty((1, value_states.shape[1], self.capacity, value_states.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (rows, Hkv, Q, D). Unforked: rows = 1, returns views of everything held. Forked: a row
        for each fork, returns what was given; attention asks `view` for each fork in turn."""
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
        if self.forks:
            keys, values = self._grow_tails(key_states, value_states, added)
            start, self.tail_length = self.tail_length, self.tail_length + added
            keys[:, :, start : self.tail_length] = key_states
            values[:, :, start : self.tail_length] = value_states
            return key_states, value_states
        start, self.length = self.length, self.length + added
        self._keys[:, :, start : self.length] = key_states
        self._values[:, :, start : self.length] = value_states
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]
        return self.keys, self.values

    def view(self, fork: int) -> tuple[Tensor, Tensor]:
        """Keys and values (1, Hkv, N, D) of one fork, shared prefix and own tail, valid until another fork is asked
        for."""
        if not self.forks:
            return self._keys[:, :, : self.length], self._values[:, :, : self.length]
        total = self.length + self.tail_length
        done = self._owned if self._owner == fork else 0
        if done < self.tail_length and self._tail_keys is not None and self._tail_values is not None:
            start = self.length + done
            self._keys[0, :, start:total] = self._tail_keys[fork, :, done : self.tail_length]
            self._values[0, :, start:total] = self._tail_values[fork, :, done : self.tail_length]
        self._owner, self._owned = fork, self.tail_length
        return self._keys[:, :, :total], self._values[:, :, :total]

    def fork(self, forks: int, tail_capacity: int) -> None:
        """Let `forks` rows go on, each for itself, for about tail_capacity tokens."""
        self.forks, self.tail_length, self._tail_capacity = forks, 0, tail_capacity
        self._tail_keys = self._tail_values = None
        if forks and self.is_initialized:
            # All layers at once and before anything else: between the large temporary tensors of attention, tails that stay
            # would leave holes in the heap.
            self._tail_keys, self._tail_values = self._new_tails(forks, tail_capacity)
        self._owner, self._owned = _NO_OWNER, 0

    def select(self, forks: list[int], index: Tensor) -> None:
        """Keep only these forks, in this order; `index` is the same list as a tensor on this layer's device."""
        if self._tail_keys is not None and self._tail_values is not None:
            self._tail_keys = self._tail_keys.index_select(0, index)
            self._tail_values = self._tail_values.index_select(0, index)
        self.forks, self._owner, self._owned = len(forks), _NO_OWNER, 0

    def rewind(self, length: int) -> None:
        """Drop all forks and every token from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length} tokens: the shared prefix has {self.length}")
        self.fork(0, 0)
        self.length = length
        if self.is_initialized:
            self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]

    def _grow_tails(self, key_states: Tensor, value_states: Tensor, added: int) -> tuple[Tensor, Tensor]:
        needed = self.tail_length + added
        if self._tail_keys is None or self._tail_values is None or self._tail_keys.shape[2] < needed:
            keys, values = self._new_tails(key_states.shape[0], max(needed, self._tail_capacity))
            if self._tail_keys is not None and self._tail_values is not None:
                keys[:, :, : self.tail_length] = self._tail_keys[:, :, : self.tail_length]
                values[:, :, : self.tail_length] = self._tail_values[:, :, : self.tail_length]
            self._tail_keys, self._tail_values = keys, values
        return self._tail_keys, self._tail_values

    def _new_tails(self, forks: int, capacity: int) -> tuple[Tensor, Tensor]:
        keys, values = (held.new_empty((forks, held.shape[1], capacity, held.shape[3])) for held in (self._keys, self._values))
        return keys, values

    # What transformers asks of a layer.

    def get_seq_length(self) -> int:
        return self.length + self.tail_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

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
    """One SharedPrefixLayer a model layer. `length` counts the tokens that all forks share."""

    layers: list[SharedPrefixLayer]  # type: ignore[assignment]

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[SharedPrefixLayer(capacity) for _ in range(num_layers)])

    @property
    def length(self) -> int:
        return self.layers[0].length

    @property
    def capacity(self) -> int:
        return self.layers[0].capacity

    def fork(self, forks: int, tail_capacity: int) -> None:
        """Go on with this many rows. One row needs no private tail: it writes after the prefix and is rewound."""
        if forks > 1:
            for layer in self.layers:
                layer.fork(forks, tail_capacity)

    def select(self, forks: list[int]) -> None:
        """Keep only these forks (numbers in the present batch), in this order."""
        indices: dict[torch.device, Tensor] = {}
        for layer in self.layers:
            if not layer.is_initialized:
                continue
            if layer.device not in indices:
                indices[layer.device] = torch.tensor(forks, device=layer.device)
            layer.select(forks, indices[layer.device])

    def rewind(self, length: int) -> None:
        for layer in self.layers:
            layer.rewind(length)

    def nbytes(self) -> int:
        """Bytes held by the buffers, tails not counted."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self.layers
            if layer.is_initialized
            for tensor in (layer._keys, layer._values)
        )
