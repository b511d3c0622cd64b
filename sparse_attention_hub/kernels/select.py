"""Choosing keys: the highest of a row's scores, or the first of an order, among those that nothing took yet.

Scores are of the lowest number of their type where a key is not allowed. Compiled loops on a CPU, torch elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..lists import KeyLists, expand_heads, from_flags, uses_loops
from ..mask import Mask


class Order(NamedTuple):
    """Keys of each row, the best first: int32 (B, h, Q, N); lengths int32 (B, Q) says how many are allowed: the first ones."""

    indices: Tensor
    lengths: Tensor


def lowest(dtype: torch.dtype) -> float | int:
    """The score of a key that is not allowed."""
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def choose(scores: Tensor, mask: Mask, sizes: Sequence[int] | Tensor, order: Order | None = None) -> KeyLists:
    """The `sizes` highest-scored keys of each row that the mask has not; rows with fewer take all of them.

    scores: (B, h, Q, N), h = 1, kv heads or H. sizes: one an item, or int64 (B, h', Q). order: of the scores, where known: then
    it is walked, and the scores are not read. Of keys that tie for the last places the most recent are taken.
    """
    batch, _, rows, keys = mask.shape
    if not isinstance(sizes, Tensor):
        sizes = torch.tensor(sizes, device=scores.device).view(-1, 1, 1)
    heads = max(scores.shape[1], mask.shared_heads, sizes.shape[1])
    sizes = expand_heads(sizes.expand(-1, -1, rows), heads).clamp(max=keys)
    width = int(sizes.max()) if sizes.numel() else 0
    if not uses_loops(scores):
        return _choose_anywhere(scores, mask, sizes, width)
    from ..loops import select

    taken = mask.lists()
    lists = torch.empty((batch, heads, rows, width), dtype=torch.int32)
    counts = torch.empty((batch, heads, rows), dtype=torch.int32)
    wanted = sizes.contiguous().numpy()
    if order is not None:
        select.walk(
            order.indices.numpy(), order.lengths.numpy(), taken.indices.numpy(), taken.counts.numpy(), wanted,
            lists.numpy(), counts.numpy(),
        )  # fmt: skip
        return KeyLists(lists, counts)
    bottom = scores.numpy().dtype.type(lowest(scores.dtype))
    left = np.empty((batch, heads, rows, keys), bottom.dtype)
    select.blank(scores.contiguous().numpy(), taken.indices.numpy(), taken.counts.numpy(), bottom, left)
    left, wanted = left.reshape(counts.numel(), keys), wanted.reshape(-1)
    thresholds = np.full(len(left), bottom)
    for size in np.unique(wanted[wanted > 0]):
        own = slice(None) if (wanted == size).all() else wanted == size
        thresholds[own] = np.partition(left[own], keys - size, axis=-1)[:, keys - size]
    select.collect(left, thresholds, wanted, bottom, lists.view(len(left), width).numpy(), counts.view(-1).numpy())
    return KeyLists(lists, counts)


def _choose_anywhere(scores: Tensor, mask: Mask, sizes: Tensor, width: int) -> KeyLists:
    ranks = expand_heads(sortable(scores), sizes.shape[1])
    ranks = ranks.masked_fill(expand_heads(mask.chosen(), sizes.shape[1]), lowest(ranks.dtype))
    best, indices = ranks.topk(width, dim=-1)
    unwanted = (torch.arange(width, device=ranks.device) >= sizes.unsqueeze(-1)) | (best == lowest(ranks.dtype))
    return KeyLists(indices.int().masked_fill(unwanted, -1), (~unwanted).sum(-1, dtype=torch.int32))


def sortable(scores: Tensor) -> Tensor:
    """int64 numbers that rank as the scores (B, h, Q, N) do, no two alike: of equal scores the most recent key is higher.

    The lowest number where a score is the lowest. int64 scores must be distinct, and are given back as they are.
    """
    if scores.dtype == torch.int64:
        return scores
    bits = scores.float().view(torch.int32)
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32  # negative numbers fall as their bits rise
    ranks = rising | torch.arange(scores.shape[-1], device=scores.device)
    return ranks.masked_fill_(scores == lowest(scores.dtype), lowest(torch.int64))


def order_of(scores: Tensor, lengths: Tensor) -> Order:
    """The keys by falling score; lengths (B, Q): allowed keys of each row."""
    lengths = lengths.int().contiguous()
    if not uses_loops(scores):
        return Order(sortable(scores).argsort(dim=-1, descending=True).int(), lengths)
    if scores.dtype == torch.int64:
        return Order(torch.from_numpy(scores.numpy().argsort(axis=-1)).flip(-1).int(), lengths)
    from ..loops.select import pack_ranks, unpack_order

    ranks = np.empty((scores.shape[:-1].numel(), scores.shape[-1]), np.int64)
    pack_ranks(scores.float().reshape(ranks.shape).numpy(), ranks)
    ranks.sort(axis=-1)  # NumPy's vectorised sort: an eighth of the time of torch's argsort
    indices = torch.empty(scores.shape, dtype=torch.int32)
    unpack_order(ranks, indices.view(ranks.shape).numpy())
    return Order(indices, lengths)


def choose_mass(scores: Tensor, terms: Tensor | None, order: Order, mask: Mask, share: float) -> KeyLists:
    """The fewest keys, by falling score (B, H, Q, N), that hold more than a share of the mass that the mask left; those that tie
    with the last are chosen too. terms: exp(score - highest of the row), where known."""
    if uses_loops(scores):
        from ..loops.select import count_mass

        taken = mask.lists()
        sizes = torch.empty(scores.shape[:3], dtype=torch.int64)
        count_mass(
            order.indices.numpy(), order.lengths.numpy(), scores.numpy(), None if terms is None else terms.numpy(),
            taken.indices.numpy(), taken.counts.numpy(), share, sizes.numpy(),
        )  # fmt: skip
        return choose(scores, mask, sizes, order)
    left = scores.masked_fill(expand_heads(mask.chosen(), scores.shape[1]), float("-inf"))
    ranked = left.gather(-1, order.indices.long())  # what is taken has no mass, wherever it stands
    top = ranked.amax(-1, keepdim=True)
    mass = (ranked - top.masked_fill(top == float("-inf"), 0.0)).exp().cumsum(-1)
    place = (mass <= share * mass[..., -1:]).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
    return from_flags((left >= ranked.gather(-1, place)) & (left > float("-inf")))


def expand_pages(pages: KeyLists, starts: list[int], page: int, allowed: Tensor) -> KeyLists:
    """The allowed keys of chosen pages. starts: the key at which each item's first page begins; allowed: bool (B, 1, Q, N)."""
    keys = allowed.shape[-1]
    if uses_loops(allowed):
        from ..loops.select import expand_pages as expand

        indices = torch.empty((*pages.indices.shape[:3], pages.indices.shape[3] * page), dtype=torch.int32)
        counts = torch.empty_like(pages.counts)
        expand(
            pages.indices.numpy(), pages.counts.numpy(), np.array(starts), page, allowed[:, 0].contiguous().numpy(),
            indices.numpy(), counts.numpy(),
        )  # fmt: skip
        return KeyLists(indices, counts)
    first = pages.indices * page + torch.tensor(starts, device=allowed.device, dtype=torch.int32).view(-1, 1, 1, 1)
    indices = first.unsqueeze(-1) + torch.arange(page, dtype=torch.int32, device=allowed.device)
    indices = indices.masked_fill((pages.indices < 0).unsqueeze(-1) | (indices >= keys), -1).flatten(3)
    permitted = allowed.expand(-1, indices.shape[1], -1, -1).gather(-1, indices.clamp(min=0).long())
    indices = indices.masked_fill(~permitted, -1)
    return KeyLists(indices, (indices >= 0).sum(-1, dtype=torch.int32))
