"""Masker states that configurations share: fitted and coded once for each context, layer and code-making settings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import Masker
from .state import AttentionState, MaskerState


class SharedStates:
    """LRU cache of at most `limit_bytes` of codes: a context is fitted once per layer and `codes_key`."""

    def __init__(self, limit_bytes: int = 256 * 2**20) -> None:
        self._limit, self._total = limit_bytes, 0
        self._held: OrderedDict[tuple[Any, ...], MaskerState] = OrderedDict()
        self._sizes: dict[tuple[Any, ...], int] = {}
        self._used: set[tuple[Any, ...]] = set()  # since the last trim: their codes may have grown

    def of(self, maskers: Sequence[Masker[Any]], context: str, keys: Tensor, layer_idx: int) -> AttentionState:
        """States of a pipeline's maskers on one layer, fitted on the keys (1, Hkv, N, D) of the named context."""
        state = AttentionState()
        for position, masker in enumerate(maskers):
            name = (context, layer_idx, masker.codes_key())
            held = self._held.get(name)
            if held is None:
                held = MaskerState()
                masker.prepare(keys, layer_idx, held)
                if held.is_fitted:  # most maskers learn nothing: a search would keep a state per trial
                    self._held[name] = held
            if held.is_fitted:
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
