"""Eviction: a fixed set of the context's keys, chosen when the context ends; what the methods of this kind share."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..kernels.select import count_up, order_of
from ..lists import KeyLists, expand_heads
from ..mask import Mask
from .base import Masker, TopKConfig
from .context_summary import ContextSummary
from .inputs import AttentionInputs
from .layout import NEVER, end_of_allowed, on_device, resolve_size
from .state import MaskerState

ConfigT = TypeVar("ConfigT", bound=TopKConfig)


class Ranking(NamedTuple):
    """order: int32 (B, h, n), the context's keys by falling importance; h = 1 or kv heads. totals: keys of each item, without
    padding."""

    order: Tensor
    totals: list[int]

    @property
    def nbytes(self) -> int:
        return self.order.nbytes


class Eviction(Masker[ConfigT]):
    """Of the context each kv head keeps the `heavy_size` most important keys, fractions being of the context's length; a sink that
    is among them spends budget. Every key after the context is kept. The choice is made once and never reads an evicted key.

    With a prepared state the context is what was prepared, observed as `state.observe` was given. Else it is the keys of the
    first call, observed by that call's queries; without a state, those of each call.
    The state keeps the ranking, 4 bytes per key and kv head, in place of codes.
    """

    code_fields: tuple[str, ...] | None = ()
    in_graphs = True

    @abstractmethod
    def importance(self, keys: Tensor, allowed: Tensor, summary: ContextSummary) -> Tensor:
        """The higher, the later it is evicted: (B, h, n), h = 1 or kv heads, of the context's keys float32 (B, Hkv, n, D).

        allowed: bool (B, n), False on padding, whose keys are 0. summary: has the parts of `observes`.
        """

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        state = inputs.state if inputs.state is not None else MaskerState()
        state.check(inputs.shape[3])
        if not state.is_fitted:
            summary = state.summary
            if summary is None:
                summary = self.shared(inputs, lambda: ContextSummary.of(inputs, self.observes))
            self._rank(inputs.keys, inputs.layout.key_positions >= 0, summary, state)
        kept = mask.union(inputs.mask(self._kept(inputs, state.fitted)))
        later = inputs.shape[3] - state.fit_length
        return kept.union(inputs.layout.keys_from(state.fit_length, later)) if later else kept

    def prepare(self, keys: Tensor, layer_idx: int, state: MaskerState, allowed: Tensor | None = None) -> None:
        """Rank the context's keys; without what this method observes, the first call does that."""
        state.check(keys.shape[2])
        if not state.is_fitted and (state.summary is not None or not self.observes):
            allowed = keys.new_ones((keys.shape[0], keys.shape[2]), dtype=torch.bool) if allowed is None else allowed
            self._rank(keys, allowed, state.summary or ContextSummary(frozenset(), keys.shape[2]), state)

    def join_fits(self, fits: list[Ranking]) -> Ranking:
        return Ranking(torch.cat([fit.order for fit in fits]), [total for fit in fits for total in fit.totals])

    def _rank(self, keys: Tensor, allowed: Tensor, summary: ContextSummary, state: MaskerState) -> None:
        length = min(end_of_allowed(allowed.any(0, keepdim=True)), summary.length)  # where the longest item ends
        keys, allowed = keys[:, :, :length], allowed[:, :length]
        keys = keys.float().masked_fill(~allowed[:, None, :, None], 0.0)
        scores = self.importance(keys, allowed, summary).masked_fill(~allowed.unsqueeze(1), NEVER)
        counts = allowed.sum(-1)
        order = order_of(scores.unsqueeze(2), counts.unsqueeze(1)).indices[:, :, 0]
        state.fitted, state.fit_length, state.length = Ranking(order, counts.tolist()), length, length

    def _kept(self, inputs: AttentionInputs, ranking: Ranking) -> KeyLists:
        sizes = resolve_size(self.config.heavy_size, ranking.totals, inputs.factors)
        heads = max(ranking.order.shape[1], sizes.shape[1])
        width = int(sizes.max())
        sizes = on_device(tuple(sizes.flatten().tolist()), torch.int64, inputs.device).view(sizes.shape)
        sizes, kept = expand_heads(sizes, heads), expand_heads(ranking.order[..., :width], heads)
        kept = kept.masked_fill(count_up(width, inputs.device) >= sizes, -1)
        rows = inputs.shape[2]
        counts = sizes.int().expand(-1, -1, rows).contiguous()
        return KeyLists(kept.unsqueeze(2).expand(-1, -1, rows, -1).contiguous(), counts)
