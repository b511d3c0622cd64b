"""The KV cache: allocated once, rewound instead of rebuilt, forked so that answers share one prefix.

A layer is one buffer [prefix | room]. Unforked, new keys are written after the prefix. Forked, each
fork has a small private tail, copied into the room after the prefix before the fork attends. So
attention always sees one contiguous (1, Hkv, N, D) view, and the prefix is never copied.

Layers with a sliding window keep all keys too, so that rewinding is exact; attention applies the window. Layers with a state
instead of keys (Mamba, linear attention, short convolutions) copy it for each fork and rewind to a saved copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer, LinearAttentionLayer, get_layer_types_and_kwargs

from .config_checks import EMPTY_KINDS, HYBRID_KINDS, RECURRENT_KINDS, layer_kinds
from .heap import own_pages


class SharedPrefixLayer(DynamicLayer):
    """One layer's keys (1, Hkv, capacity, D) and values (1, Hkv, capacity, DV). Lengths are in tokens.

    deferred: `update` stores nothing and returns its arguments; attention stores the keys and values that it is given, with
    `append`. They may be wider than what the model keeps itself: a model with a latent (MLA) makes them of it.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.deferred = False
        self.length = 0  # tokens that all forks share
        self.forks = 0  # 0 = not forked
        self.tail_length = 0  # tokens of each fork after the shared ones
        self._tail_capacity = 0
        #: Of forks whose tokens are counted on the device: all of them, int64 without dimensions. See `open`.
        self.end: Tensor | None = None
        self._open_length = 0
        self._buffers: list[Tensor] = []  # keys and values
        self._tails: list[Tensor] = []  # keys and values (forks, Hkv, tail capacity, D)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What a model calls with new keys and values (rows, Hkv, Q, D). Returns all of them, or if deferred its arguments."""
        if self.deferred:
            return key_states, value_states
        self.append(key_states, value_states)
        return (key_states, value_states) if self.forks else (self.keys, self.values)  # type: ignore[return-value]

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store keys and values (rows, Hkv, Q, D): rows = 1, or one row per fork. `view` then has them."""
        if not self._buffers:
            self._allocate(key_states, value_states)
        if self.end is not None:
            place = (self.end - self.length).view(1)
            for tail, new in zip(self._tails, (key_states, value_states), strict=True):
                tail.index_copy_(2, place, new)
            return
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
        else:
            self.length += added
            self.keys, self.values = self.view(0)

    def _allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [own_pages(t, (1, t.shape[1], self.capacity, t.shape[3])) for t in (key_states, value_states)]
        self.is_initialized = True
        if self.forks:  # forked before its first keys: an empty prefix
            self.fork(self.forks, self._tail_capacity)

    def view(self, fork: int) -> tuple[Tensor, Tensor]:
        """Keys and values (1, Hkv, N, D) of one fork, shared prefix and own tail, valid until the next call of `view`."""
        total = self.total
        for buffer, tail in zip(self._buffers, self._tails, strict=False):  # unforked, there are no tails
            buffer[0, :, self.length : total] = tail[fork, :, : self._own_length]
        keys, values = (buffer[:, :, :total] for buffer in self._buffers)
        return keys, values

    def shared(self) -> tuple[Tensor, Tensor]:
        """Keys and values (1, Hkv, length, D) of the prefix alone, views."""
        keys, values = (buffer[:, :, : self.length] for buffer in self._buffers)
        return keys, values

    def tails(self) -> tuple[Tensor, Tensor]:
        """Keys and values (forks, Hkv, tail length, D) of the forks' own tokens, views."""
        keys, values = (tail[:, :, : self._own_length] for tail in self._tails)
        return keys, values

    def open(self, end: Tensor | None, room: int = 0) -> None:
        """From here on keys and values of one token are stored at `end`, and views hold free slots, too, for `room` tokens at most.
        None ends that. Then `tail_length` must be what was stored."""
        self.end = end
        self._open_length = min(self.tail_length + room, self._tail_capacity, self.capacity - self.length)
        for tail in self._tails if end is not None else ():
            tail[:, :, self.tail_length :] = 0  # free slots are read, if only to be masked: there may be NaN

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Inside, views hold what was stored alone."""
        end, self.end = self.end, None
        try:
            yield
        finally:
            self.end = end

    @property
    def _own_length(self) -> int:
        """Tokens of each fork's tail that views hold."""
        return self.tail_length if self.end is None else self._open_length

    @property
    def total(self) -> int:
        """Tokens of each fork that views hold."""
        return self.length + self._own_length

    def fork(self, forks: int, tail_capacity: int) -> None:
        """Continue with `forks` independent rows, for at most tail_capacity tokens each; 0 drops all forks."""
        self.forks, self.tail_length, self._tail_capacity, self.end = forks, 0, tail_capacity, None
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
        if not self._buffers:
            return
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length} tokens: the shared prefix has {self.length}")
        self.fork(0, 0)
        self.length = length
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


class RecurrentLayer(LinearAttentionLayer):
    """A layer that keeps a state of fixed size: a row per fork."""

    def __init__(self, number_of_states: int = 1) -> None:
        super().__init__(number_of_states=number_of_states)
        self._saved: list[tuple[dict[int, Tensor], int, Tensor]] = []

    def save_states(self) -> None:
        """Remember the states, for `restore_states`."""
        self._saved = [(states, index, state.clone()) for states, index, state in self._states()]

    def restore_states(self) -> None:
        for states, index, state in self._saved:
            states[index] = state.clone()

    def fork_states(self, forks: int) -> None:
        for states, index, state in self._states():
            states[index] = state.repeat_interleave(forks, 0)

    def select_states(self, index: Tensor) -> None:
        for states, place, state in self._states():
            states[place] = state.index_select(0, index.to(state.device))

    def state_bytes(self) -> int:
        return sum(state.nbytes for _, _, state in self._states())

    def _states(self) -> list[tuple[dict[int, Tensor], int, Tensor]]:
        """(dictionary, index, state) of each state that the model has set."""
        kinds: list[dict[int, Any]] = [self.conv_states, self.recurrent_states]
        return [(states, index, state) for states in kinds for index, state in states.items() if state is not None]


class HybridLayer(RecurrentLayer, SharedPrefixLayer):  # type: ignore[misc, override]
    """A layer with both: attention and a recurrent mixer side by side."""

    def __init__(self, capacity: int, number_of_states: int = 1) -> None:
        SharedPrefixLayer.__init__(self, capacity)
        RecurrentLayer.__init__(self, number_of_states)

    get_max_length, reset, crop = SharedPrefixLayer.get_max_length, SharedPrefixLayer.reset, SharedPrefixLayer.crop
    reorder_cache = SharedPrefixLayer.reorder_cache


class SharedPrefixCache(Cache):
    """One layer per layer of a model: SharedPrefixLayer for attention, RecurrentLayer for a state, HybridLayer for both."""

    layers: list[Any]

    def __init__(self, config: Any, capacity: int) -> None:
        """config: of the text decoder. capacity: tokens."""
        options = get_layer_types_and_kwargs(config)[1]
        layers: list[Any] = []
        for kind, given in zip(layer_kinds(config), options, strict=False):
            states = {"number_of_states": given.get("number_of_states", 1)}
            if kind in RECURRENT_KINDS:
                layers.append(RecurrentLayer(**states))
            elif kind in HYBRID_KINDS:
                layers.append(HybridLayer(capacity, **states))
            else:
                layers.append(DummyLayer() if kind in EMPTY_KINDS else SharedPrefixLayer(capacity))
        super().__init__(layers=layers)
        self.capacity = capacity
        self.attention = [layer for layer in layers if isinstance(layer, SharedPrefixLayer)]
        self.recurrent = [layer for layer in layers if isinstance(layer, RecurrentLayer)]

    def defer(self, deferred: bool) -> None:
        """Whether attention stores keys and values, instead of the model's own calls of `update`."""
        for layer in self.attention:
            layer.deferred = deferred

    def save(self) -> None:
        """Remember the recurrent states here: where `rewind` returns to."""
        for layer in self.recurrent:
            layer.save_states()

    def fork(self, forks: int, tail_capacity: int, again: bool = False) -> None:
        """Continue with `forks` rows of at most tail_capacity tokens. One row needs no private tail, unless it may fork again."""
        if forks > 1 or again:
            for layer in self.attention:
                layer.fork(forks, tail_capacity)
            for state in self.recurrent:
                state.fork_states(forks)

    def select(self, forks: list[int]) -> None:
        """Keep only these forks (their indices in the current batch), in this order; one that is named twice forks."""
        initialized = [layer for layer in self.attention if layer.is_initialized]
        indices = {device: torch.tensor(forks, device=device) for device in {layer.device for layer in initialized}}
        for layer in initialized:
            layer.select(forks, indices[layer.device])
        for state in self.recurrent:
            state.select_states(next(iter(indices.values())))

    def rewind(self, length: int) -> None:
        """Back to the first `length` tokens, unforked. With recurrent layers, `length` must be where `save` was called."""
        for layer in self.attention:
            layer.rewind(length)
        for state in self.recurrent:
            state.restore_states()

    def nbytes(self) -> int:
        """Bytes held by the buffers and states, without the tails."""
        held = sum(buffer.nbytes for layer in self.attention for buffer in layer._buffers)
        return held + sum(state.state_bytes() for state in self.recurrent)
