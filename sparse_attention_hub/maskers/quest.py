"""Quest: the pages of keys whose bounds promise the highest scores (https://arxiv.org/abs/2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import dot_all
from ..search_space import Choice
from .base import check_int, draw_example, register_masker
from .codes import pack_levels, packs, pseudo_quantise, unpack_levels
from .inputs import AttentionInputs
from .layout import NEVER
from .pages import PageMasker, PagesConfig, cut_pages


@dataclass
class QuestTopKMaskerConfig(PagesConfig):
    """heavy_size: keys to keep, int (tokens) or float (fraction of N), in whole pages and 3 pages at least.

    page_size: keys a page. label_bits: bits of each page bound, 1 to 16; 16 = as the keys are.
    """

    label_bits: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.label_bits = check_int("label_bits", self.label_bits, 1, 16)

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        codes = {"page_size": Choice([8, 16, 32, 64]), "label_bits": Choice([2, 4, 8, 16])}
        return super().get_search_space(task_name) | codes


@register_masker(QuestTopKMaskerConfig)
class QuestTopKMasker(PageMasker[QuestTopKMaskerConfig]):
    """With each page's channelwise minimum and maximum, sum_c max(q_c min_c, q_c max_c) bounds q.k of its keys; each query head
    attends to the pages with the highest bounds. A page that a row sees in part is bounded by all of its keys."""

    code_fields = ("page_size", "label_bits")
    min_pages = 3

    def summarise(self, keys: Tensor, allowed: Tensor | None, starts: list[int], first: int, last: int) -> Tensor:
        return page_bounds(keys, allowed, starts, self.config.page_size, first, last, self.config.label_bits)

    def score(self, inputs: AttentionInputs, summaries: Tensor) -> Tensor:
        signed = torch.cat([inputs.queries.clamp(min=0), inputs.queries.clamp(max=0)], -1)
        if packs(inputs.keys, self.config.label_bits):
            bounds = unpack_levels(summaries, 2, inputs.keys.shape[3], self.config.label_bits)
            summaries = _in_order(*bounds.unbind(-2))
        return dot_all(signed, summaries, 1.0)

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        width = 8 * inputs.keys.element_size()
        return min(self.config.label_bits if self.config.label_bits < 16 else width, width) / width / self.config.page_size


def page_bounds(keys: Tensor, allowed: Tensor | None, starts: list[int], page: int, first: int, last: int, bits: int) -> Tensor:
    """Bounds of pages [first, last), rounded to `bits` bits: (B, Hkv, last - first, 2D), maxima and then minima, or packed."""
    if allowed is None and last == first + 1 and len(set(starts)) == 1:  # a decode step's, which may be unfinished
        minima, maxima = keys[:, :, starts[0] + first * page :][:, :, :page].aminmax(dim=2, keepdim=True)
    else:
        low, high = (cut_pages(keys, allowed, starts, page, first, last, fill) for fill in (-NEVER, NEVER))
        minima, maxima = low.amin(3), high.amax(3)
        # A page of padding alone has no bounds; it is never chosen, its zeros only keep the arithmetic finite.
        empty = maxima == NEVER
        minima, maxima = minima.masked_fill(empty, 0.0), maxima.masked_fill(empty, 0.0)
    if bits >= 16:
        return torch.cat([maxima, minima], -1)
    if packs(keys, bits):
        return pack_levels(torch.stack([maxima, minima], -2), bits)
    return _in_order(pseudo_quantise(maxima, bits), pseudo_quantise(minima, bits))


def _in_order(maxima: Tensor, minima: Tensor) -> Tensor:
    """Maxima and then minima, (..., 2D): rounding may have pushed a minimum above its maximum."""
    return torch.cat([torch.maximum(minima, maxima), torch.minimum(minima, maxima)], -1)


if __name__ == "__main__":
    draw_example("quest")
