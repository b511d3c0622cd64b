"""What maskers keep between decode steps: a fit on the context, and codes of every key so far."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SeveralLayersError

if TYPE_CHECKING:
    from .context_summary import ContextSummary


class _Buffer:
    """Codes (B, Hkv, n, ...) with room for more; it grows by an eighth, so that most decode steps copy their own codes only.

    shared: the first codes that several states have in common, None = it is one state's. owner: the state whose own codes
    follow them, up to `filled`.
    """

    def __init__(self, like: Tensor) -> None:
        self.codes = like[:, :, :0]
        self.shared: int | None = None
        self.owner: object = None
        self.filled = 0

    def reserve(self, length: int, held: int) -> None:
        """Room for `length` codes, a copy of the first `held` ones; the rest is 0, which is a code of any kind."""
        grown = self.codes.new_zeros((*self.codes.shape[:2], length, *self.codes.shape[3:]))
        grown[:, :, :held] = self.codes[:, :, :held]
        self.codes = grown

    def write(self, codes: Tensor, first: int) -> None:
        """Put codes behind the `first` ones."""
        end = first + codes.shape[2]
        frozen = self.codes.is_inference() and not torch.is_inference_mode_enabled()
        if frozen or end > self.codes.shape[2]:
            self.reserve(end + max(64, first // 8), first)
        self.codes[:, :, first:end] = codes


class MaskerState:
    """One masker's memory of one layer.

    `fitted`: what `Masker.fit` made of the context's keys; frozen from then on. A code belongs to one key; a masker that codes
    whole pages sets `keys_per_code` and `offset` (keys before the first page) as it fits. Only complete pages have a code:
    rewinding into a page drops its code. `summary`: what the context's prefill saw, to be fitted on; see AttentionState.observe.

    Forks share the codes of their common keys. Each keeps its later codes in a tail of its own, which is copied behind the
    shared ones before it reads: configurations side by side need one copy of a long context's codes, as of its keys.
    """

    def __init__(self) -> None:
        self.fitted: Any = None
        self.summary: ContextSummary | None = None
        self.fit_length = 0
        self.length = 0
        self.keys_per_code = 1
        self.offset = 0
        self._buffer: _Buffer | None = None
        self._tail: _Buffer | None = None  # codes after the shared ones
        self._name = object()  # as the buffer's owner
        self._source: MaskerState | None = None  # of a fork: as long as it lives, others can be forked from it

    @property
    def is_fitted(self) -> bool:
        return self.fit_length > 0

    def check(self, total: int) -> None:
        """Raises ValueError if a call brings fewer keys than the state has seen."""
        if total < self.length:
            raise ValueError(f"the state holds {self.length} keys but the call brings {total}: call state.rewind({total})")

    def count(self, length: int) -> int:
        """Codes that the first `length` keys have."""
        return max(0, length - self.offset) // self.keys_per_code

    def codes(self, unfinished: Tensor | None = None) -> Tensor:
        """Codes of the first `length` keys, (B, Hkv, length, ...), or of their complete pages. Valid until the codes of a state
        with the same source are asked for. unfinished: codes that follow these and are not kept."""
        buffer, count = self._buffer, self.count(self.length)
        if buffer is None:
            assert unfinished is not None
            return unfinished
        if buffer.shared is not None:
            first = buffer.filled if buffer.owner is self._name else buffer.shared
            if count > first:
                assert self._tail is not None
                buffer.write(self._tail.codes[:, :, first - buffer.shared : count - buffer.shared], first)
            buffer.owner, buffer.filled = self._name, count
        if unfinished is not None:  # written behind them, where the next codes will be: nothing is copied
            buffer.write(unfinished, count)
            count += unfinished.shape[2]
        return buffer.codes[:, :, :count]

    def put(self, code: Tensor, place: Tensor, room: int) -> Tensor:
        """Codes (B, Hkv, room, ...) with this one (B, Hkv, 1, ...) at a place that only the device knows, int64 (1,), of a fork's
        own; what follows it is undefined. `length` stays: see open_layout.py."""
        if self._buffer is None or self._buffer.shared is None:  # of the context nothing has a code: all are this state's own
            self._tail, self._buffer = self._buffer, _Buffer(code)
            self._buffer.shared = 0
        buffer, self._tail = self._buffer, self._tail or _Buffer(code)
        assert buffer.shared is not None
        own = room - buffer.shared
        for part, size in ((self._tail, own), (buffer, room)):
            if part.codes.shape[2] < size:
                part.reserve(size, part.codes.shape[2])
        self._tail.codes.index_copy_(2, place - buffer.shared, code)
        buffer.codes[:, :, buffer.shared : room] = self._tail.codes[:, :, :own]
        buffer.owner = None
        return buffer.codes[:, :, :room]

    def append(self, codes: Tensor, length: int | None = None) -> None:
        """Add the next codes, (B, Hkv, n, ...). length: keys seen now, default one more for each code."""
        held = self.count(self.length)
        if self._buffer is None:
            self._buffer = _Buffer(codes)
        if self._buffer.shared is None:
            self._buffer.write(codes, held)
        else:
            self._tail = self._tail or _Buffer(codes)
            self._tail.write(codes, held - self._buffer.shared)
        self.length = self.length + codes.shape[2] if length is None else length

    def rewind(self, length: int) -> None:
        """Forget keys past `length`. Below what was fitted on, the fit is forgotten too."""
        self.length = min(self.length, length)
        if self.summary is not None and length < self.summary.length:
            self.summary = None
        if length < self.fit_length:
            self.fitted, self.fit_length, self.length, self._buffer, self._source = None, 0, 0, None, None
        buffer, count = self._buffer, self.count(self.length)
        if buffer is None or (buffer.shared is not None and count <= buffer.shared):
            self._tail = None
        if buffer is not None and buffer.shared is not None:
            if buffer.owner is self._name:
                buffer.filled = min(buffer.filled, count)
            if count < buffer.shared:  # what follows is no longer what the others have there
                self._buffer = _Buffer(buffer.codes)
                self._buffer.write(buffer.codes[:, :, :count], 0)

    def fork(self, length: int) -> MaskerState:
        """An independent state of the first `length` keys, which shares their codes."""
        buffer, held = self._buffer, self.count(self.length)
        if buffer is not None and buffer.shared is None:
            buffer.shared = self.count(min(length, self.length))
            if held > buffer.shared:
                self._tail = _Buffer(buffer.codes)
                self._tail.write(buffer.codes[:, :, buffer.shared : held], 0)
        forked = copy.copy(self)
        forked._name, forked._source = object(), self
        if self._tail is not None and buffer is not None and buffer.shared is not None:
            own = self._tail.codes[:, :, : held - buffer.shared]
            forked._tail = _Buffer(own)
            forked._tail.write(own, 0)
        forked.rewind(length)
        return forked

    @staticmethod
    def join(states: Sequence[MaskerState], fitted: Any) -> MaskerState:
        """A state whose items are those of several states, with a copy of their codes. fitted: their fits, see Masker.join_fits.
        SeveralLayersError if they have seen or hold different numbers of keys."""
        joined, held = MaskerState(), [state.codes() for state in states if state._buffer is not None]
        places = {(state.fit_length, state.length, state.keys_per_code, state.offset) for state in states}
        if len(places) > 1 or len({(codes.shape, codes.dtype) for codes in held}) > 1 or 0 < len(held) < len(states):
            raise SeveralLayersError(f"states of {len(states)} layers do not fit together: {sorted(places)}")
        joined.fitted = fitted
        joined.fit_length, joined.length, joined.keys_per_code, joined.offset = places.pop()
        if held:
            joined._buffer = _Buffer(held[0])
            joined._buffer.codes = torch.cat(held)
        return joined

    def parts(self) -> list[Tensor]:
        """The tensors that hold codes: those that forks share, and its own."""
        return [part.codes for part in (self._buffer, self._tail) if part is not None]

    def bytes(self) -> int:
        """Memory held by the codes, or by a fit in place of them, in bytes; those that it shares count in full."""
        return sum(part.nbytes for part in self.parts()) + int(getattr(self.fitted, "nbytes", 0))


class AttentionState:
    """The memory of all maskers of one ResearchAttention, per layer and per masker instance."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, int], MaskerState] = {}
        self._summaries: dict[int, ContextSummary] = {}

    def observe(self, layer_idx: int, summary: ContextSummary) -> None:
        """Give the maskers what the context's prefill saw in a layer. Call it before `prepare`; a fit that is made stays."""
        self._summaries[layer_idx] = summary
        for (layer, _), entry in self._entries.items():
            if layer == layer_idx:
                entry.summary = summary

    def entry(self, layer_idx: int, position: int) -> MaskerState:
        """The memory of the masker at `position` of the pipeline in layer `layer_idx`."""
        entry = self._entries.get((layer_idx, position))
        if entry is None:
            entry = self._entries[layer_idx, position] = MaskerState()
            entry.summary = self._summaries.get(layer_idx)
        return entry

    def adopt(self, layer_idx: int, position: int, entry: MaskerState) -> None:
        """Use a state that is held elsewhere too."""
        self._entries[layer_idx, position] = entry

    def fork(self, length: int) -> AttentionState:
        """An independent memory of the first `length` keys, see MaskerState.fork."""
        forked = AttentionState()
        forked._summaries = dict(self._summaries)
        forked._entries = {place: entry.fork(length) for place, entry in self._entries.items()}
        return forked

    def parts(self) -> list[Tensor]:
        """The tensors that hold codes; attentions side by side share some of them."""
        return [part for entry in self._entries.values() for part in entry.parts()]

    def rewind(self, length: int) -> None:
        """Follow the KV cache back to `length` keys. Raises ValueError for a negative length."""
        if length < 0:
            raise ValueError(f"length must be >= 0, got {length}")
        self._summaries = {layer: summary for layer, summary in self._summaries.items() if summary.length <= length}
        for entry in self._entries.values():
            entry.rewind(length)
