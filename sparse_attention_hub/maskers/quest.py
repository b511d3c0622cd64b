"""Quest: the pages of keys whose bounds promise the highest scores (https://arxiv.org/abs/2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.reference import group_scores
from ..kernels.select import choose, expand_pages
from ..mask import Mask
from ..search_space import Choice
from .base import Masker, TopKConfig, check_int, draw_example, register_masker
from .codes import pseudo_quantise
from .inputs import AttentionInputs
from .layout import NEVER, end_of_allowed
from .state import MaskerState

MIN_PAGES = 3


@dataclass
class QuestTopKMaskerConfig(TopKConfig):
    """heavy_size: keys to keep, int (tokens) or float (fraction of N), in whole pages and 3 pages at least.

    page_size: keys a page. label_bits: bits of each page bound, 1 to 16; 16 = as the keys are.
    """

    page_size: int
    label_bits: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.page_size = check_int("page_size", self.page_size, 1)
        self.label_bits = check_int("label_bits", self.label_bits, 1, 16)

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        codes = {"page_size": Choice([8, 16, 32, 64]), "label_bits": Choice([2, 4, 8, 16])}
        return super().get_search_space(task_name) | codes


@register_masker(QuestTopKMaskerConfig)
class QuestTopKMasker(Masker[QuestTopKMaskerConfig]):
    """Keys are cut into pages, counted from an item's first allowed key. With each page's channelwise minimum and maximum,
    sum_c max(q_c min_c, q_c max_c) bounds q.k of its keys; the pages with the highest bounds are attended whole.

    Pages that earlier maskers cover spend budget too. A page that a row sees in part is bounded by all of its keys.
    The state keeps the bounds of complete pages; a decode step bounds the unfinished last page only.
    """

    keeps_to_allowed = True
    code_fields = ("page_size", "label_bits")

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        page = self.config.page_size
        starts, scores = self.shared(inputs, lambda: self._page_scores(inputs))
        pages = scores.shape[-1]
        sizes = inputs.resolve(self.config.heavy_size)
        kept = torch.where(sizes >= inputs.layout.totals, pages, (sizes // page).clamp(min=MIN_PAGES))
        chosen = choose(scores, Mask.empty((*inputs.shape[:3], pages), inputs.device), kept)
        return mask.union(inputs.mask(expand_pages(chosen, starts, page, inputs.allowed)))

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        width = 8 * inputs.keys.element_size()
        return min(self.config.label_bits if self.config.label_bits < 16 else width, width) / width / self.config.page_size

    def prepare(self, keys: Tensor, layer_idx: int, state: MaskerState, allowed: Tensor | None = None) -> None:
        """Bound the complete pages that are new: codes (B, Hkv, pages, 2D), maxima and then minima.

        The fit is the key, below page_size, at which each item's first page starts.
        """
        page = self.config.page_size
        state.check(keys.shape[2])
        if not state.is_fitted:
            first = [0] * keys.shape[0] if allowed is None else allowed.to(torch.uint8).argmax(-1).tolist()
            state.fitted, state.fit_length = [int(key) % page for key in first], keys.shape[2]
            state.keys_per_code, state.offset = page, max(state.fitted)
        seen = keys.shape[2] if allowed is None else end_of_allowed(allowed)
        have, complete = state.count(state.length), state.count(max(seen, state.length))
        if complete > have:
            state.append(page_bounds(keys, allowed, state.fitted, page, have, complete, self.config.label_bits), seen)
        state.length = max(seen, state.length)

    def _page_scores(self, inputs: AttentionInputs) -> tuple[list[int], Tensor]:
        """(first key of each item's first page, bounds of q.k (B, H, Q, pages), -inf where nothing is allowed)."""
        state = inputs.state if inputs.state is not None else MaskerState()
        allowed = None if inputs.layout.all_allowed else inputs.allowed[:, 0, -1]
        self.prepare(inputs.keys, inputs.layer_idx, state, allowed)
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


def page_bounds(keys: Tensor, allowed: Tensor | None, starts: list[int], page: int, first: int, last: int, bits: int) -> Tensor:
    """Bounds of pages [first, last), rounded to `bits` bits: (B, Hkv, last - first, 2D), maxima and then minima.

    keys: (B, Hkv, N, D), which may end within the last page. allowed: bool (B, N), keys outside it bound nothing.
    """
    if len(set(starts)) > 1:
        own = [None] * len(starts) if allowed is None else torch.split(allowed, 1)
        each = zip(torch.split(keys, 1), own, starts, strict=True)
        return torch.cat([page_bounds(k, a, [start], page, first, last, bits) for k, a, start in each])
    span = slice(starts[0] + first * page, starts[0] + last * page)
    low = high = keys[:, :, span]
    if allowed is not None:
        outside = ~allowed[:, None, span, None]
        low, high = low.masked_fill(outside, -NEVER), high.masked_fill(outside, NEVER)
    missing = (last - first) * page - low.shape[2]
    if missing:
        low, high = F.pad(low, (0, 0, 0, missing), value=-NEVER), F.pad(high, (0, 0, 0, missing), value=NEVER)
    paged = (*keys.shape[:2], last - first, page, keys.shape[3])
    minima, maxima = low.reshape(paged).amin(3), high.reshape(paged).amax(3)
    # A page of padding alone has no bounds; it is never chosen, its zeros only keep the arithmetic finite.
    empty = maxima == NEVER
    minima = pseudo_quantise(minima.masked_fill(empty, 0.0), bits)
    maxima = pseudo_quantise(maxima.masked_fill(empty, 0.0), bits)
    # Rounding may push a minimum above its maximum.
    return torch.cat([torch.maximum(minima, maxima), torch.minimum(minima, maxima)], -1)


if __name__ == "__main__":
    draw_example("quest")
