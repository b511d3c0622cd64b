"""Whole pages of keys, chosen by a summary of each page: what Quest and landmarks share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.select import choose, count_up, expand_pages
from ..mask import Mask
from .base import Masker, TopKConfig, check_int
from .inputs import AttentionInputs
from .layout import NEVER, end_of_allowed
from .state import MaskerState


@dataclass
class PagesConfig(TopKConfig):
    """heavy_size: keys to keep, int (tokens) or float (fraction of N), in whole pages. page_size: keys per page."""

    page_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.page_size = check_int("page_size", self.page_size, 1)


PagesConfigT = TypeVar("PagesConfigT", bound=PagesConfig)


class PageMasker(Masker[PagesConfigT]):
    """Keys are cut into pages, counted from an item's first allowed key; the pages with the highest scores are attended whole.

    Pages that earlier maskers cover spend budget too. A page that a row sees in part is summarised by all of its keys.
    The state keeps the summaries of complete pages; a decode step summarises the unfinished last page only.
    """

    keeps_to_allowed = True
    in_graphs = True
    score_bytes = (17, 3)
    code_fields: tuple[str, ...] | None = ("page_size",)
    #: The fewest pages that are kept.
    min_pages = 1

    @abstractmethod
    def summarise(self, keys: Tensor, allowed: Tensor | None, starts: list[int], first: int, last: int) -> Tensor:
        """Summaries of pages [first, last): (B, Hkv, last - first, width), finite for a page of padding alone.

        keys: (B, Hkv, N, D), which may end within the last page. allowed: bool (B, N), False on padding. starts: the key at
        which each item's first page begins.
        """

    @abstractmethod
    def score(self, inputs: AttentionInputs, summaries: Tensor) -> Tensor:
        """Scores of the pages, higher for better ones: (B, H, Q, pages)."""

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        page = self.config.page_size
        starts, scores = self.shared(inputs, lambda: self.page_scores(inputs))
        pages = scores.shape[-1]
        sizes, most = inputs.bounded(self.config.heavy_size)
        kept = torch.where(sizes >= inputs.layout.totals, pages, (sizes // page).clamp(min=self.min_pages))
        most = None if most is None else max(self.min_pages, -(-most // page))
        chosen = choose(scores, Mask.empty((*inputs.shape[:3], pages), inputs.device), kept, most=most)
        return mask.union(inputs.mask(expand_pages(chosen, starts, page, inputs.allowed)))

    def prepare(self, keys: Tensor, layer_idx: int, state: MaskerState, allowed: Tensor | None = None) -> None:
        """Summarise the complete pages that are new. The fit is the key, below page_size, at which each item's first page starts."""
        page = self.config.page_size
        state.check(keys.shape[2])
        if not state.is_fitted:
            first = [0] * keys.shape[0] if allowed is None else allowed.to(torch.uint8).argmax(-1).tolist()
            state.fitted, state.fit_length = [int(key) % page for key in first], keys.shape[2]
            state.keys_per_code, state.offset = page, max(state.fitted)
        seen = keys.shape[2] if allowed is None else end_of_allowed(allowed)
        have, complete = state.count(state.length), state.count(max(seen, state.length))
        if complete > have:
            state.append(self.summarise(keys, allowed, state.fitted, have, complete), seen)
        state.length = max(seen, state.length)

    def join_fits(self, fits: list[list[int]]) -> list[int]:
        return [start for starts in fits for start in starts]

    def page_scores(self, inputs: AttentionInputs) -> tuple[list[int], Tensor]:
        """(first key of each item's first page, scores (B, H, Q, pages), -inf where nothing is allowed)."""
        state = inputs.state if inputs.state is not None else MaskerState()
        if inputs.layout.length is not None:
            return state.fitted, self._scores_with_room(inputs, state, inputs.layout.length)
        allowed = inputs.layout.known_keys
        self.prepare(inputs.keys, inputs.layers[0], state, allowed)
        starts: list[int] = state.fitted
        page, keys = self.config.page_size, inputs.shape[3]
        complete = state.count(state.length)
        pages = -(-(keys - min(starts)) // page)
        unfinished = self.summarise(inputs.keys, allowed, starts, complete, pages) if pages > complete else None
        scores = self.score(inputs, state.codes(unfinished))
        if not inputs.layout.all_allowed:
            first = torch.tensor(starts).unsqueeze(-1).to(inputs.device, non_blocking=True)
            slots = first + torch.arange(pages * page, device=inputs.device)
            places = slots.clamp(max=keys - 1)[:, None, None].expand(-1, 1, inputs.shape[2], -1)
            permitted = inputs.allowed.gather(-1, places) & (slots < keys)[:, None, None]
            scores = scores.masked_fill(~permitted.view(*permitted.shape[:3], pages, page).any(-1), NEVER)
        return starts, scores

    def _scores_with_room(self, inputs: AttentionInputs, state: MaskerState, end: Tensor) -> Tensor:
        """Scores of all pages that there is room for, -inf for those to come; see open_layout.py. The page of the last key is
        summarised in every step, so a page that later steps leave is complete."""
        page, keys, (start,) = self.config.page_size, inputs.shape[3], state.fitted
        current = ((end - 1 - start) // page).view(1)
        slots = start + current * page + count_up(page, inputs.device)
        last = inputs.keys.index_select(2, slots.clamp(max=keys - 1))
        summary = self.summarise(last, (slots < end).unsqueeze(0), [0], 0, 1)
        pages = -(-(keys - start) // page)
        scores = self.score(inputs, state.put(summary, current, pages))
        return scores.masked_fill_(count_up(pages, inputs.device) > current, NEVER)


def cut_pages(keys: Tensor, allowed: Tensor | None, starts: list[int], page: int, first: int, last: int, fill: float) -> Tensor:
    """The keys of pages [first, last), `fill` where they are missing or not allowed: (B, Hkv, last - first, page, D)."""
    if len(set(starts)) > 1:
        own = [None] * len(starts) if allowed is None else torch.split(allowed, 1)
        each = zip(torch.split(keys, 1), own, starts, strict=True)
        return torch.cat([cut_pages(k, a, [start], page, first, last, fill) for k, a, start in each])
    span = slice(starts[0] + first * page, starts[0] + last * page)
    part = keys[:, :, span]
    if allowed is not None:
        part = part.masked_fill(~allowed[:, None, span, None], fill)
    missing = (last - first) * page - part.shape[2]
    if missing:
        part = F.pad(part, (0, 0, 0, missing), value=fill)
    return part.reshape(*keys.shape[:2], last - first, page, keys.shape[3])
