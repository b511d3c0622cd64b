"""Rounding to pages: what a paged KV cache makes of a choice (vLLM's PagedAttention, https://arxiv.org/abs/2309.06180)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..lists import expand_heads
from ..mask import Mask
from .base import Masker, MaskerConfig, check_int, draw_example, register_masker
from .inputs import AttentionInputs

SHARED_BY = ("head", "kv_head", "layer")


@dataclass
class RoundToPagesConfig(MaskerConfig):
    """page_size: keys per page, counted from an item's first allowed key.

    share: whose choices are joined first, since an engine has one page table for them: "head" (none), "kv_head" (the query heads
    of a group) or "layer" (all heads).
    """

    page_size: int = 16
    share: str = "kv_head"

    def __post_init__(self) -> None:
        self.page_size = check_int("page_size", self.page_size, 1)
        if self.share not in SHARED_BY:
            raise ValueError(f"share must be one of {', '.join(SHARED_BY)}, got {self.share!r}")


@register_masker(RoundToPagesConfig)
class RoundToPages(Masker[RoundToPagesConfig]):
    """Attends to every allowed key of each page that holds a chosen key. It goes last: it chooses nothing by itself.

    A choice of scattered keys gets many times its density, so the two are compared at equal density, not at equal settings.
    Behind a sampler it is refused as any masker: the keys that it adds would not have been drawn.
    """

    keeps_to_allowed = True
    in_graphs = True
    score_bytes = (34, 14)

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        chosen = _joined(mask.chosen(), inputs, self.config.share)
        page = inputs.key_positions.clamp(min=0) // self.config.page_size  # (B, N); padding is not chosen, and not allowed
        page = page[:, None, None].expand(*chosen.shape[:3], -1)
        pages = inputs.shape[3] // self.config.page_size + 1
        hits = torch.zeros((*chosen.shape[:3], pages), dtype=torch.int32, device=chosen.device)
        touched = hits.scatter_add_(-1, page, chosen.int()).gather(-1, page) > 0
        return mask.union(inputs.mask(touched & inputs.allowed))


def _joined(chosen: Tensor, inputs: AttentionInputs, share: str) -> Tensor:
    """Flags (B, h, Q, N) joined over the query heads that share pages."""
    if share == "head" or chosen.shape[1] == 1:
        return chosen
    if share == "layer":
        return chosen.any(1, keepdim=True)
    batch, _, rows, keys = chosen.shape
    return expand_heads(chosen, inputs.shape[1]).reshape(batch, inputs.kv_heads, -1, rows, keys).any(2)


if __name__ == "__main__":
    draw_example("round_to_pages")
