"""Pages of keys: where they start, and the channelwise bounds of the keys in them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import NEVER
from .quantise import pseudo_quantise


def page_starts(keys: Tensor, allowed: Tensor | None, page: int) -> list[int]:
    """Key index, below `page`, at which each item's grid of pages starts, so that its first allowed key starts a page.

    keys: (B, Hkv, N, D); allowed: bool (B, N), None = all.
    """
    if allowed is None:
        return [0] * keys.shape[0]
    return [int(first) % page for first in allowed.to(torch.uint8).argmax(-1).tolist()]


def page_bounds(keys: Tensor, allowed: Tensor | None, starts: list[int], page: int, first: int, last: int, bits: int) -> Tensor:
    """Bounds of pages [first, last), the last one cut short at N: (B, Hkv, last - first, 2D), maxima and then minima.

    keys: (B, Hkv, N, D); allowed: bool (B, N), keys outside it bound nothing; both bounds are rounded to `bits` bits.
    """
    if len(set(starts)) > 1:
        items = [slice(b, b + 1) for b in range(keys.shape[0])]
        own = [None if allowed is None else allowed[b] for b in items]
        parts = [
            page_bounds(keys[b], a, [start], page, first, last, bits) for b, a, start in zip(items, own, starts, strict=True)
        ]
        return torch.cat(parts)
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
