"""Masker states that configurations share: fitted and coded once for each context, layer and code-making settings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from .base import Masker
from .context_summary import ContextSummary
from .state import AttentionState, MaskerState


class SharedStates:
    """LRU cache of at most `limit_bytes` of codes: a context is fitted once per layer and `codes_key`.

    A state that was dropped is found again while a fork of it lives: its codes are in memory anyway.
    """

    def __init__(self, limit_bytes: int = 256 * 2**20) -> None:
        self._limit, self._total = limit_bytes, 0
        self._held: OrderedDict[tuple[Any, ...], MaskerState] = OrderedDict()
        self._alive: WeakValueDictionary[tuple[Any, ...], MaskerState] = WeakValueDictionary()
        self._sizes: dict[tuple[Any, ...], int] = {}
        self._used: set[tuple[Any, ...]] = set()  # since the last trim: their codes may have grown

    def of(
        self,
        maskers: Sequence[Masker[Any]],
        context: str,
        keys: Tensor,
        layer_idx: int,
        summary: ContextSummary | None = None,
    ) -> AttentionState:
        """States of a pipeline's maskers on one layer, fitted on the keys (1, Hkv, N, D) of the named context and what its prefill
        saw of the layer."""
        state = AttentionState()
        for position, masker in enumerate(maskers):
            if not masker.learns:
                continue
            question = summary.question if masker.observes and summary is not None else ()
            name = (context, layer_idx, masker.codes_key(), question)
            held = self._alive.get(name)
            if held is None:
                held = MaskerState()
                held.summary = summary
                masker.prepare(keys, layer_idx, held)
            if held.is_fitted:  # most maskers learn nothing: a search would keep a state per trial
                self._held[name] = self._alive[name] = held
                self._held.move_to_end(name)
                self._used.add(name)
            state.adopt(layer_idx, position, held)
        return state

    def trim(self) -> None:
        """Drop the least recently used states until the limit holds."""
        for name in self._used & self._held.keys():
            size = self._held[name].bytes()
            self._total += size - self._sizes.get(name, 0)
            self._sizes[name] = size
        self._used.clear()
        while self._total > self._limit and self._held:
            self._forget(next(iter(self._held)))

    def _forget(self, name: tuple[Any, ...]) -> None:
        del self._held[name]
        self._total -= self._sizes.pop(name, 0)

    def forget(self, context: str) -> None:
        """Forget a context."""
        for name in [name for name in self._held if name[0] == context]:
            self._forget(name)
        for name in [name for name in self._alive if name[0] == context]:
            del self._alive[name]
