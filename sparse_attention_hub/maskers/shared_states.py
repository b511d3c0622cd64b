"""Masker states that configurations share: fitted and coded once for each context, layer and code-making settings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from ..errors import SeveralLayersError
from .base import Masker
from .call_cache import once
from .context_summary import ContextSummary
from .inputs import AttentionInputs
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

    def of_call(
        self,
        maskers: Sequence[Masker[Any]],
        context: str,
        length: int,
        inputs: AttentionInputs,
        summaries: Sequence[ContextSummary | None],
    ) -> AttentionState:
        """As `of`, for a call that may have a layer per item. Each layer is fitted and coded by itself, on the first `length` keys;
        configurations with equal codes share a copy of them with the layers as items, which lasts as long as the call."""
        if len(inputs.layers) == 1:
            return self.of(maskers, context, inputs.keys[:, :, :length], inputs.layers[0], summaries[0])
        state, known = AttentionState(), inputs.layout.known_keys

        def join(masker: Masker[Any]) -> MaskerState:
            layers, each = list(zip(inputs.layers, inputs.keys.split(1), strict=True)), []
            for (layer_idx, keys), summary in zip(layers, summaries, strict=True):
                each.append(self.of([masker], context, keys[:, :, :length], layer_idx, summary).entry(layer_idx, 0))
                if not each[-1].is_fitted:
                    raise SeveralLayersError(f"{type(masker).__name__} is not fitted before its first call")
            fitted = masker.join_fits([own.fitted for own in each])  # before any of them is coded further: it may refuse
            for (layer_idx, keys), own in zip(layers, each, strict=True):
                if own.length < keys.shape[2]:
                    masker.prepare(keys, layer_idx, own, None if known is None else known[:1])
            return MaskerState.join(each, fitted)

        for position, masker in enumerate(maskers):
            if masker.learns:
                joined = once(inputs.cache.call, ("joined", masker.codes_key()), partial(join, masker))
                state.adopt(inputs.layers[0], position, joined)
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
