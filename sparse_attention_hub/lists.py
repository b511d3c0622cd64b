"""Lists of selected keys as tensors. Compiled loops on a CPU, torch elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

HAS_NUMBA = find_spec("numba") is not None

#: Off the CPU, lists of several queries with up to so many entries are as wide as the keys: the longest one is not awaited.
WIDE_ENTRIES = 2**25


class KeyLists(NamedTuple):
    """indices int32 (B, h, Q, K), -1 = padding, no key twice; counts int32 (B, h, Q); probability
    float32 (B, h, Q, K), None = certain. h is 1, the number of kv heads, or H. Where compiled loops
    are used, padding comes last in a list; elsewhere it may be anywhere."""

    indices: Tensor
    counts: Tensor
    probability: Tensor | None = None

    @property
    def heads(self) -> int:
        return self.indices.shape[1]


def uses_loops(tensor: Tensor) -> bool:
    """Whether compiled loops work on this tensor."""
    return HAS_NUMBA and tensor.device.type == "cpu"


def may_be_wide(batch: int, heads: int, rows: int, keys: int) -> bool:
    """Whether lists as wide as the keys are small, or replace a wait in decoding."""
    return rows == 1 or batch * heads * rows * keys <= WIDE_ENTRIES


def as_arrays(*values: Any) -> list[Any]:
    """Arguments of a compiled loop: CPU tensors as arrays, tuples as their members."""
    arrays: list[Any] = []
    for value in values:
        if isinstance(value, tuple):
            arrays += as_arrays(*value)
        else:
            arrays.append(value.contiguous().numpy() if isinstance(value, Tensor) else value)
    return arrays


def expand_heads(tensor: Tensor, heads: int) -> Tensor:
    """(B, h, ...) to (B, heads, ...): each of the h entries serves heads / h neighbouring heads."""
    held = tensor.shape[1]
    if held == heads:
        return tensor
    if held == 1:
        return tensor.expand(-1, heads, *tensor.shape[2:])
    return tensor.repeat_interleave(heads // held, dim=1)


def empty_lists(batch: int, heads: int, rows: int, width: int, weighted: bool = False) -> KeyLists:
    """Uninitialised lists on a CPU."""
    shape = (batch, heads, rows)
    indices, counts = torch.empty((*shape, width), dtype=torch.int32), torch.empty(shape, dtype=torch.int32)
    return KeyLists(indices, counts, torch.empty((*shape, width)) if weighted else None)


def from_flags(flags: Tensor, compact: bool = True) -> KeyLists:
    """Flags bool (B, h, Q, N) as lists of ascending indices.

    compact: lists are as long as the longest of them. Else, off the CPU, they have N entries, so that no count is awaited.
    """
    counts = flags.sum(-1, dtype=torch.int32)
    if not (compact or uses_loops(flags)):
        keys = torch.arange(flags.shape[3], dtype=torch.int32, device=flags.device)
        return KeyLists(torch.where(flags, keys, -1), counts)
    width = int(counts.max()) if counts.numel() else 0
    if uses_loops(flags):
        from .loops.lists import pack

        batch, heads, rows, _ = flags.shape
        lists = empty_lists(batch, heads, rows, width)._replace(counts=counts)
        pack(*as_arrays(flags, lists.indices))
        return lists
    # Place 0 takes what is not chosen, and is cut off.
    indices = torch.full((*flags.shape[:3], width + 1), -1, dtype=torch.int32, device=flags.device)
    keys = torch.arange(flags.shape[3], dtype=torch.int32, device=flags.device).expand(flags.shape)
    return KeyLists(indices.scatter_(-1, flags.cumsum(-1) * flags, keys)[..., 1:], counts)


def from_dense(dense: Tensor, compact: bool = True) -> KeyLists:
    """Flags bool, or inclusion probabilities float, (B, h, Q, N) as lists of ascending indices. compact: see `from_flags`."""
    if dense.dtype == torch.bool:
        return from_flags(dense, compact)
    lists = from_flags(dense > 0, compact)
    return lists._replace(probability=dense.gather(-1, lists.indices.clamp(min=0).long()))


def from_indices(indices: Tensor, probability: Tensor | None = None) -> KeyLists:
    """Integer indices (B, h, Q, K), padded with -1 anywhere, as lists."""
    padded = indices < 0
    if uses_loops(indices) and bool(padded.any()):
        order = padded.to(torch.uint8).argsort(dim=-1, stable=True)  # keys keep their order, padding goes to the end
        indices = indices.gather(-1, order)
        probability = None if probability is None else probability.gather(-1, order)
    return KeyLists(indices.int().contiguous(), (~padded).sum(-1, dtype=torch.int32), probability)


def to_flags(lists: KeyLists, keys: int) -> Tensor:
    """Lists as flags bool (B, h, Q, keys)."""
    return _scatter(lists.indices, True, keys, torch.bool)


def to_probability(lists: KeyLists, keys: int) -> Tensor:
    """Lists as inclusion probabilities float32 (B, h, Q, keys)."""
    return _scatter(lists.indices, 1.0 if lists.probability is None else lists.probability, keys, torch.float32)


def append(first: KeyLists, second: KeyLists) -> KeyLists:
    """The union of two lists per row that share no key."""
    heads, uncertain = max(first.heads, second.heads), first.probability is not None or second.probability is not None
    if uses_loops(first.indices):
        from .loops.lists import append as append_lists

        joined = _empty_union(first, second)
        append_lists(*as_arrays(first, second, joined))
        return joined
    if uncertain:
        first, second = _with_probability(first), _with_probability(second)
    indices, probability = (
        None if one is None or other is None else torch.cat([expand_heads(one, heads), expand_heads(other, heads)], -1)
        for one, other in ((first.indices, second.indices), (first.probability, second.probability))
    )
    assert indices is not None
    return KeyLists(indices, expand_heads(first.counts, heads) + expand_heads(second.counts, heads), probability)


def join(first: KeyLists, second: KeyLists, keys: int, flags: Callable[[], Tensor]) -> KeyLists:
    """The union of two lists per row; a key in both gets p + q - pq. flags: those of the first."""
    if uses_loops(first.indices):
        from .loops.lists import join as join_lists

        joined = _empty_union(first, second)
        join_lists(*as_arrays(first, second, keys, joined))
        return joined
    heads = max(first.heads, second.heads)
    if first.probability is not None or second.probability is not None:
        p, q = (expand_heads(to_probability(lists, keys), heads) for lists in (first, second))
        return from_dense(p + q - p * q)
    own, other = expand_heads(first.indices, heads), expand_heads(second.indices, heads)
    double = expand_heads(flags(), heads).gather(-1, other.clamp(min=0).long())
    indices = torch.cat([own, other.masked_fill(double, -1)], -1)
    return KeyLists(indices, (indices >= 0).sum(-1, dtype=torch.int32))


def _empty_union(first: KeyLists, second: KeyLists) -> KeyLists:
    """Room for the keys of both."""
    batch, _, rows, width = first.indices.shape
    uncertain = first.probability is not None or second.probability is not None
    return empty_lists(batch, max(first.heads, second.heads), rows, width + second.indices.shape[3], uncertain)


def without_first(lists: KeyLists, counts: Tensor) -> KeyLists:
    """Lists without the first keys of each row, which are counts (B, h, Q) many."""
    counts = expand_heads(counts, lists.heads)
    left, width = lists.counts - counts, lists.indices.shape[3]
    place = torch.arange(width, device=counts.device) + counts.unsqueeze(-1)
    padded, place = place >= lists.counts.unsqueeze(-1), place.clamp(max=max(width - 1, 0))
    p = lists.probability
    return KeyLists(lists.indices.gather(-1, place).masked_fill(padded, -1), left, None if p is None else p.gather(-1, place))


def count_groups(lists: KeyLists, kv_heads: int, keys: int) -> Tensor:
    """Distinct keys in the lists of the query heads of a kv head: int32 (B, kv_heads, Q)."""
    batch, heads, rows, _ = lists.indices.shape
    if uses_loops(lists.indices):
        from .loops.lists import count_groups as count

        out = torch.empty((batch, kv_heads, rows), dtype=torch.int32)
        count(*as_arrays(lists.indices, lists.counts, keys, out))
        return out
    grouped = lists.indices.view(batch, kv_heads, heads // kv_heads, rows, -1).transpose(2, 3)
    return _scatter(grouped.reshape(batch, kv_heads, rows, -1), True, keys, torch.bool).sum(-1, dtype=torch.int32)


def _with_probability(lists: KeyLists) -> KeyLists:
    if lists.probability is not None:
        return lists
    return lists._replace(probability=torch.ones_like(lists.indices, dtype=torch.float32))


def _scatter(indices: Tensor, value: Tensor | float | bool, keys: int, dtype: torch.dtype) -> Tensor:
    """`value` at indices (B, h, Q, K), 0 elsewhere. Padding goes to a column that is cut off."""
    out = torch.zeros((*indices.shape[:3], keys + 1), dtype=dtype, device=indices.device)
    return out.scatter_(-1, indices.long() + 1, value)[..., 1:]
