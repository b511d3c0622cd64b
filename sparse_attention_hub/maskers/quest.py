"""Quest: the pages of keys whose bounds promise the highest scores (https://arxiv.org/abs/2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import group_scores
from ..kernels.select import choose, expand_pages
from ..mask import Mask
from ..search_space import Choice, LogUniform
from .base import Masker, MaskerConfig, check_int, check_size, register_masker
from .inputs import AttentionInputs
from .layout import NEVER, end_of_allowed
from .pages import page_bounds, page_starts
from .state import MaskerState

MIN_PAGES = 3


@dataclass
class QuestTopKMaskerConfig(MaskerConfig):
    """heavy_size: keys to keep, int (tokens) or float (fraction of N), in whole pages and 3 pages at least.

    page_size: keys a page. label_bits: bits of each page bound, 1 to 16; 16 = as the keys are.
    """

    heavy_size: int | float
    page_size: int
    label_bits: int = 16

    def __post_init__(self) -> None:
        self.heavy_size = check_size("heavy_size", self.heavy_size)
        self.page_size = check_int("page_size", self.page_size, 1)
        self.label_bits = check_int("label_bits", self.label_bits, 1, 16)

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return {
            "heavy_size": LogUniform(0.005, 0.5),
            "page_size": Choice([8, 16, 32, 64]),
            "label_bits": Choice([2, 4, 8, 16]),
        }


@register_masker(QuestTopKMaskerConfig)
class QuestTopKMasker(Masker[QuestTopKMaskerConfig]):
    """Keys are cut into pages, counted from an item's first allowed key. With each page's channelwise minimum and maximum,
    sum_c max(q_c min_c, q_c max_c) bounds q.k of its keys; the pages with the highest bounds are attended whole.

    Pages that earlier maskers cover already spend the budget too. A page that a row sees in part is bounded by all of its
    keys, but only keys that the row may see are attended.
    Complete pages are kept in the state; a decode step bounds the unfinished one at the end, and no other.
    """

    keeps_to_allowed = True
    code_fields = ("page_size", "label_bits")

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        page = self.config.page_size
        starts, scores = self.shared(inputs, lambda: self._page_scores(inputs))
        pages = scores.shape[-1]
        sizes = zip(inputs.resolve(self.config.heavy_size), inputs.layout.n_allowed, strict=True)
        kept = [pages if size >= n else min(pages, max(MIN_PAGES, size // page)) for size, n in sizes]
        chosen = choose(scores, Mask.empty((*inputs.shape[:3], pages), inputs.device), kept)
        return mask.union(inputs.mask(expand_pages(chosen, starts, page, inputs.allowed)))

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        width = 8 * inputs.keys.element_size()
        return min(self.config.label_bits if self.config.label_bits < 16 else width, width) / width / self.config.page_size

    def prepare(self, keys: Tensor, layer_idx: int, state: MaskerState, allowed: Tensor | None = None) -> None:
        self._extend(keys, layer_idx, state, allowed)

    def _extend(self, keys: Tensor, layer_idx: int, state: MaskerState, allowed: Tensor | None) -> None:
        """Bring the bounds of complete pages up to date, (B, Hkv, pages, 2D): maxima, then minima."""
        state.check(keys.shape[2])
        if not state.is_fitted:
            state.fitted, state.fit_length = page_starts(keys, allowed, self.config.page_size), keys.shape[2]
            state.keys_per_code, state.offset = self.config.page_size, max(state.fitted)
        seen = keys.shape[2] if allowed is None else end_of_allowed(allowed)
        have, complete = state.count(state.length), state.count(max(seen, state.length))
        if complete > have:
            bits = self.config.label_bits
            state.append(page_bounds(keys, allowed, state.fitted, state.keys_per_code, have, complete, bits), seen)
        state.length = max(seen, state.length)

    def _page_scores(self, inputs: AttentionInputs) -> tuple[list[int], Tensor]:
        """(the key at which each item's first page starts, bounds of q.k (B, H, Q, pages), -inf where nothing is allowed)."""
        state = inputs.state if inputs.state is not None else MaskerState()
        allowed = None if inputs.layout.all_allowed else inputs.allowed[:, 0, -1]
        self._extend(inputs.keys, inputs.layer_idx, state, allowed)
        starts: list[int] = state.fitted
        page, keys = self.config.page_size, inputs.shape[3]
        complete = state.count(state.length)
        pages = -(-(keys - min(starts)) // page)
        bounds = state.codes() if complete else inputs.keys.new_empty((*inputs.keys.shape[:2], 0, 2 * inputs.keys.shape[3]))
        if pages > complete:
            tail = page_bounds(inputs.keys, allowed, starts, page, complete, pages, self.config.label_bits)
            bounds = torch.cat([bounds, tail], 2)
        signed = torch.cat([inputs.queries.clamp(min=0), inputs.queries.clamp(max=0)], -1)
        scores = group_scores(signed, bounds, 1.0)
        if not inputs.layout.all_allowed:
            slots = torch.tensor(starts, device=inputs.device).unsqueeze(-1) + torch.arange(pages * page, device=inputs.device)
            places = slots.clamp(max=keys - 1)[:, None, None].expand(-1, 1, inputs.shape[2], -1)
            permitted = inputs.allowed.gather(-1, places) & (slots < keys)[:, None, None]
            scores = scores.masked_fill(~permitted.view(*permitted.shape[:3], pages, page).any(-1), NEVER)
        return starts, scores


if __name__ == "__main__":
    from sparse_attention_hub.maskers.drawing import main

    main("quest")
