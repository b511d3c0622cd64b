"""Choosing keys: the highest of a row's scores, or the first of an order, among those that nothing took yet.

Scores are of the lowest number of their type where a key is not allowed. Compiled loops on a CPU, torch elsewhere.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..lists import KeyLists, as_arrays, empty_lists, expand_heads, uses_loops
from ..mask import Mask

#: No rank that `sortable` gives a key that may be chosen is as low as this, the highest rank of -inf.
NOTHING = -(0x7F800000 << 32) - 1


class Order(NamedTuple):
    """Keys of each row, the best first: int32 (B, h, Q, N); lengths int32 (B, Q) says how many are allowed: the first ones."""

    indices: Tensor
    lengths: Tensor


def lowest(dtype: torch.dtype) -> float | int:
    """The score of a key that is not allowed."""
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def choose(
    scores: Tensor,
    mask: Mask,
    sizes: Tensor,
    allowed: Tensor | None = None,
    most: int | None = None,
) -> KeyLists:
    """The `sizes` highest-scored keys of each row that the mask has not; rows with fewer take all of them.

    scores: (B, h, Q, N), h = 1, kv heads or H. sizes: int64 (B, h', Q) or (B, h', 1). Of keys that tie for the
    last places the most recent are taken. allowed: bool (B, 1, Q, N); None where the scores of other keys are the lowest already.
    most: no size is above it; then sizes on a device are not awaited.
    """
    batch, _, rows, keys = mask.shape
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    heads = max(scores.shape[1], mask.shared_heads, sizes.shape[1])
    if most is None or sizes.device.type == "cpu":
        largest = int(sizes.max()) if sizes.numel() else 0
        assert most is None or largest <= most, f"a size is {largest}, where none is above {most}"
        most = largest
    width = min(most, keys)
    if not uses_loops(scores):
        sizes = expand_heads(sizes.expand(-1, -1, rows), heads).clamp(max=keys)
        even = sizes.device.type == "cpu" and bool((sizes == width).all())  # known without a wait for the device
        each = None if even else sizes.to(scores.device, non_blocking=True)
        return _choose_anywhere(scores, mask, heads, width, each, allowed)
    from ..loops import select

    lists = empty_lists(batch, heads, rows, width)
    where = None if allowed is None else allowed[:, 0]
    select.choose(*_as_bits(*as_arrays(scores)), *as_arrays(where, mask.lists()[:2], sizes, lists[:2]))
    return lists


def _as_bits(scores: np.ndarray) -> tuple[np.ndarray, np.generic, np.generic]:
    """(scores as integers of their size, which bits of negative ones to flip so that they rise with the scores, what stands for
    the lowest score)."""
    if scores.dtype.kind == "i":
        return scores, scores.dtype.type(0), scores.dtype.type(np.iinfo(scores.dtype).min)
    bits = scores.view(f"i{scores.itemsize}")
    flip = bits.dtype.type(np.iinfo(bits.dtype).max)
    return bits, flip, scores.dtype.type(-np.inf).view(bits.dtype) ^ flip


def extend(order: Order, mask: Mask, sizes: Tensor, drawn: bool = False) -> KeyLists:
    """The mask's keys, then the first `sizes` others of each row's order, or all. On a CPU, where an order is known.

    sizes: as for choose. drawn: the order is random, and p of the others is their share of what the mask left; else p = 1.
    """
    from ..loops.select import walk

    batch, _, rows, keys = mask.shape
    taken, heads = mask.lists(), max(order.indices.shape[1], mask.shared_heads, sizes.shape[1])
    sizes = expand_heads(sizes.expand(-1, -1, rows), heads).clamp(max=keys)
    width = taken.indices.shape[3] + (int(sizes.max()) if sizes.numel() else 0)
    lists = empty_lists(batch, heads, rows, width, drawn or taken.probability is not None)
    walk(*as_arrays(order, taken, sizes, drawn, lists))
    return lists


def walk_anywhere(order: Order, mask: Mask, sizes: Tensor) -> KeyLists:
    """What `extend` adds to the mask's keys, on any device. Lists have N entries, without waiting for counts."""
    heads = max(order.indices.shape[1], mask.shared_heads, sizes.shape[1])
    indices = expand_heads(order.indices, heads)
    sizes = expand_heads(sizes.to(indices.device, non_blocking=True), heads)
    left = count_up(indices.shape[-1], indices.device) < order.lengths[:, None, :, None]
    if not mask.is_empty:
        left = torch.gt(left, expand_heads(mask.chosen(), heads).gather(-1, indices.long()))
    found = left & (left.cumsum(-1) <= sizes.unsqueeze(-1))
    return KeyLists(torch.where(found, indices, -1), found.sum(-1, dtype=torch.int32))


def _choose_anywhere(
    scores: Tensor, mask: Mask, heads: int, width: int, sizes: Tensor | None, allowed: Tensor | None
) -> KeyLists:
    """width: the largest size; sizes (B, h, Q): None if all are equal. Lists have `width` entries, without waiting for counts."""
    closed = None if mask.is_empty else mask.chosen()
    if allowed is not None:
        closed = ~mask.residual(allowed)
    scores = expand_heads(scores, heads)
    if closed is not None:
        scores = scores.masked_fill(expand_heads(closed, heads), lowest(scores.dtype))
    best, indices = sortable(scores).topk(width, dim=-1, sorted=sizes is not None)
    found = best > NOTHING
    if sizes is not None:
        found &= count_up(width, scores.device) < sizes.unsqueeze(-1)
    return KeyLists(torch.where(found, indices, -1).int(), found.sum(-1, dtype=torch.int32))


def sortable(scores: Tensor) -> Tensor:
    """int64 numbers that rank as the scores (B, h, Q, N) do, no two alike: of equal scores the most recent key is higher.

    At most NOTHING where a score is the lowest. int64 scores must be distinct, and are given back as they are.
    """
    if scores.dtype == torch.int64:
        return scores
    bits = scores.float().view(torch.int32)
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32  # negative numbers fall as their bits rise
    return rising | count_up(scores.shape[-1], scores.device)


def count_up(length: int, device: torch.device) -> Tensor:
    """0, 1, 2, ... int64, made once for all layers and steps."""
    return _numbers(1 << max(0, length - 1).bit_length(), device)[:length]


@lru_cache(maxsize=64)
def _numbers(length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(length, device=device)


def order_of(scores: Tensor, lengths: Tensor) -> Order:
    """The keys by falling score; lengths (B, Q): allowed keys of each row."""
    lengths = lengths.int().contiguous()
    if not uses_loops(scores):
        return Order(sortable(scores).argsort(dim=-1, descending=True).int(), lengths)
    if scores.dtype == torch.int64:
        return Order(torch.from_numpy(scores.numpy().argsort(axis=-1)).flip(-1).int(), lengths)
    from ..loops.select import pack_ranks, unpack_order

    ranks, indices = torch.empty(scores.shape, dtype=torch.int64), torch.empty(scores.shape, dtype=torch.int32)
    pack_ranks(*as_arrays(scores.float().flatten(0, -2), ranks.flatten(0, -2)))
    ranks.numpy().sort(axis=-1)  # NumPy's vectorised sort: an eighth of the time of torch's argsort
    unpack_order(*as_arrays(ranks.flatten(0, -2), indices.flatten(0, -2)))
    return Order(indices, lengths)


def count_mass(scores: Tensor, terms: Tensor | None, order: Order, mask: Mask, share: float) -> Tensor:
    """How many keys `choose_mass` chooses of each row: int64 (B, H, Q). On a CPU. terms: exp(score - highest of the row), where
    known."""
    from ..loops.select import count_mass as count

    sizes = torch.empty(scores.shape[:3], dtype=torch.int64)
    count(*as_arrays(order, scores, terms, mask.lists()[:2], share, sizes))
    return sizes


def choose_mass(scores: Tensor, order: Order, mask: Mask, share: float) -> KeyLists | Tensor:
    """The fewest keys, by falling score (B, H, Q, N), that hold more than a share of the mass that the mask left, as lists or flags;
    those that tie with the last are chosen too."""
    left = scores.masked_fill(expand_heads(mask.chosen(), scores.shape[1]), float("-inf"))
    ranked = left.gather(-1, order.indices.long())  # what is taken has no mass, wherever it stands
    top = ranked.amax(-1, keepdim=True)
    mass = (ranked - top.masked_fill(top == float("-inf"), 0.0)).exp().cumsum(-1)
    place = (mass <= share * mass[..., -1:]).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
    least = ranked.gather(-1, place)
    if scores.shape[2] > 1:
        return (left >= least) & (left > float("-inf"))
    found = (ranked >= least) & (ranked > float("-inf"))
    return KeyLists(torch.where(found, order.indices, -1), found.sum(-1, dtype=torch.int32))


def expand_pages(pages: KeyLists, starts: list[int], page: int, allowed: Tensor) -> KeyLists:
    """The allowed keys of chosen pages. starts: the key at which each item's first page begins; allowed: bool (B, 1, Q, N)."""
    keys = allowed.shape[-1]
    if uses_loops(allowed):
        from ..loops.select import expand_pages as expand

        batch, heads, rows, width = pages.indices.shape
        lists = empty_lists(batch, heads, rows, width * page)
        expand(*as_arrays(pages[:2], np.array(starts), page, allowed[:, 0], lists[:2]))
        return lists
    first = pages.indices * page
    if any(starts):
        first += torch.tensor(starts, device=allowed.device, dtype=torch.int32).view(-1, 1, 1, 1)
    indices = first.unsqueeze(-1) + torch.arange(page, dtype=torch.int32, device=allowed.device)
    indices = indices.masked_fill((pages.indices < 0).unsqueeze(-1) | (indices >= keys), -1).flatten(3)
    permitted = allowed.expand(-1, indices.shape[1], -1, -1).gather(-1, indices.clamp(min=0).long())
    indices = indices.masked_fill(~permitted, -1)
    return KeyLists(indices, (indices >= 0).sum(-1, dtype=torch.int32))
