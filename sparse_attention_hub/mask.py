"""Mask: which keys each query attends to, and with what inclusion probability."""

from __future__ import annotations

import torch
from torch import Tensor

from .lists import (
    KeyLists,
    append,
    count_groups,
    expand_heads,
    from_dense,
    from_indices,
    join,
    to_flags,
    to_probability,
    uses_loops,
    without_first,
)

Shape = tuple[int, int, int, int]


class Mask:
    """Inclusion probabilities p in [0, 1] for every (batch, query head, query, key); 0 = not attended.

    The softmax term of an attended key is weighted by 1/p. A mask is a value: no method changes it.
    It is stored as lists of keys (for kernels), as flags, or both; the missing form is made when
    first read. Both have h heads: H, 1 if all heads share them, or kv_heads if the query heads of a
    group do. Sharing is what saves KV reads.
    """

    def __init__(
        self,
        shape: Shape,
        kv_heads: int | None = None,
        *,
        lists: KeyLists | None = None,
        dense: Tensor | None = None,
        apart_from: Mask | None = None,
        joined: KeyLists | None = None,
        is_filled: bool = False,
    ) -> None:
        """Use `empty`, `from_indices`, `from_range` or `from_dense` instead.

        apart_from: a mask that shares no key with this one, which was chosen among what it left: their union needs no look-up.
        joined: in place of lists, those of both masks, the other's keys first. is_filled: every row with allowed keys is known to
        attend to one, so that no device need be asked.
        """
        self.shape = shape
        self.kv_heads = kv_heads if kv_heads is not None else shape[1]
        self._lists = lists
        self._dense = dense
        self._flags: Tensor | None = None
        self._apart_from, self._joined, self.is_filled = apart_from, joined, is_filled

    # -- making masks ------------------------------------------------------------------------------------------------

    @staticmethod
    def empty(shape: Shape, device: torch.device | str = "cpu", kv_heads: int | None = None) -> Mask:
        """Nothing is attended. shape: (B, H, Q, N)."""
        nothing = torch.empty((shape[0], 1, shape[2], 0), dtype=torch.int32, device=device)
        return Mask(shape, kv_heads, lists=KeyLists(nothing, nothing.new_zeros(nothing.shape[:3])))

    @staticmethod
    def from_indices(indices: Tensor, shape: Shape, probability: Tensor | None = None, kv_heads: int | None = None) -> Mask:
        """indices: integer (B, h, Q, K), -1 = padding, distinct in a row; h is 1, kv_heads or H.
        probability: float (B, h, Q, K), None = certain. ValueError if the shapes do not fit."""
        heads = {1, shape[1], kv_heads or 1}
        if indices.dim() != 4 or indices.shape[0] != shape[0] or indices.shape[2] != shape[2]:
            raise ValueError(f"indices must be (B, h, Q, K) = ({shape[0]}, h, {shape[2]}, K), got {tuple(indices.shape)}")
        if indices.shape[1] not in heads:
            raise ValueError(f"indices must have {sorted(heads)} heads, got {indices.shape[1]}")
        if probability is not None and probability.shape != indices.shape:
            raise ValueError(f"probability must be {tuple(indices.shape)}, got {tuple(probability.shape)}")
        probability = None if probability is None else probability.float()
        return Mask(shape, kv_heads, lists=from_indices(indices, probability))

    @staticmethod
    def from_range(
        start: int, stop: int, shape: Shape, device: torch.device | str = "cpu", kv_heads: int | None = None
    ) -> Mask:
        """The keys from `start` up to `stop`, the same for all items, heads and rows."""
        indices = torch.arange(start, stop, dtype=torch.int32, device=device).expand(shape[0], 1, shape[2], -1).contiguous()
        counts = torch.full((shape[0], 1, shape[2]), stop - start, dtype=torch.int32, device=device)
        return Mask(shape, kv_heads, lists=KeyLists(indices, counts), is_filled=stop > start)

    @staticmethod
    def from_dense(dense: Tensor, heads: int | None = None, kv_heads: int | None = None, is_filled: bool = False) -> Mask:
        """dense: bool (attended or not) or float inclusion probabilities, (B, H, Q, N), or
        (B, h, Q, N) with `heads` = H. is_filled: see Mask. Raises ValueError if the shape does not fit."""
        if dense.dim() != 4:
            raise ValueError(f"a dense mask must be (B, H, Q, N), got {tuple(dense.shape)}")
        batch, given, rows, keys = dense.shape
        heads = heads if heads is not None else given
        known = {1, heads, kv_heads or 1}
        if given not in known:
            raise ValueError(f"a dense mask must have {sorted(known)} heads, got {given}")
        dense = dense if dense.dtype == torch.bool else dense.float()
        return Mask((batch, heads, rows, keys), kv_heads, dense=dense, is_filled=is_filled)

    # -- reading masks -----------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self._held.device

    @property
    def is_empty(self) -> bool:
        """True if no masker has selected keys yet (by construction: flags are not searched)."""
        return self._lists is not None and self._lists.indices.shape[-1] == 0

    @property
    def is_certain(self) -> bool:
        """True if every attended key has p = 1 (known by construction)."""
        return self._dense.dtype == torch.bool if self._dense is not None else self.lists().probability is None

    @property
    def shared_heads(self) -> int:
        """How many heads the mask is stored for: 1, kv_heads or H."""
        return self._held.shape[1]

    @property
    def _held(self) -> Tensor:
        lists = self._joined or self._lists
        return lists.indices if lists is not None else self._dense  # type: ignore[return-value]

    def lists(self) -> KeyLists:
        """The keys of each row, for `shared_heads` heads."""
        if self._lists is None:
            if self._joined is not None and self._apart_from is not None:
                self._lists = without_first(self._joined, self._apart_from.counts())
            else:
                assert self._dense is not None
                self._lists = from_dense(self._dense, compact=self.shape[2] > 1)  # decoding does not wait for the longest list
        return self._lists

    def chosen(self) -> Tensor:
        """bool (B, h, Q, N), True where p > 0; h = `shared_heads`."""
        if self._flags is None:
            if self._dense is not None:
                self._flags = self._dense if self._dense.dtype == torch.bool else self._dense > 0
            else:
                self._flags = to_flags(self.lists(), self.shape[3])
        return self._flags

    def inclusion_probability(self) -> Tensor:
        """float32 (B, H, Q, N)."""
        held = self._dense.float() if self._dense is not None else to_probability(self.lists(), self.shape[3])
        return expand_heads(held, self.shape[1])

    def residual(self, allowed: Tensor) -> Tensor:
        """Allowed keys that no masker selected: bool (B, h, Q, N). allowed: bool (B, 1, Q, N)."""
        return allowed if self.is_empty else torch.gt(allowed, self.chosen())  # allowed and not chosen, in one pass

    def counts(self) -> Tensor:
        """Attended keys of each row: int32 (B, h, Q)."""
        if self._lists is None and not uses_loops(self._held):
            return self.chosen().sum(-1, dtype=torch.int32)
        return self.lists().counts

    def group_counts(self) -> Tensor:
        """Distinct keys of each row over a kv head's query heads: int32 (B, kv_heads or 1, Q)."""
        if self.shared_heads in (1, self.kv_heads):
            return self.counts()
        return count_groups(self.lists(), self.kv_heads, self.shape[3])

    def to_indices(self, group: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """(idx int32, count int32, log_weight = -log p float32): a list's first `count` entries are
        keys, the rest is padding (idx 0, log_weight -inf).

        group=False: idx (B, H, Q, K), count (B, H, Q), log_weight as idx or None (all 0).
        group=True: one list per kv head, the union over its query heads and rows: idx
        (B, kv_heads, K), count (B, kv_heads), log_weight (B, H, Q, K), -inf also where that row did
        not select the key.
        """
        batch, heads, rows, keys = self.shape
        if group:
            chosen = expand_heads(self.chosen(), heads)
            union = from_dense(chosen.reshape(batch, self.kv_heads, -1, keys).any(2, keepdim=True))
            index, count = union.indices[:, :, 0], union.counts[:, :, 0]
            by_row = expand_heads(index, heads).unsqueeze(2).expand(-1, -1, rows, -1)
        else:
            lists = self.lists()
            if not uses_loops(lists.indices):  # padding may be anywhere
                lists = from_dense(self.chosen())
            index, count = expand_heads(lists.indices, heads), expand_heads(lists.counts, heads)
            if self.is_certain:
                return index.clamp(min=0), count, None
            by_row = index
        p = self.inclusion_probability().gather(-1, by_row.clamp(min=0).long())
        log_weight = (-p.log()).masked_fill((by_row < 0) | (p == 0), float("-inf"))
        return index.clamp(min=0), count, log_weight

    # -- combining masks ---------------------------------------------------------------------------------------------

    def union(self, other: Mask) -> Mask:
        """Attended if either mask attends; p + q - pq, as of independent coins, if both do.
        Raises ValueError if the shapes differ."""
        if self.shape != other.shape:
            raise ValueError(f"masks of shapes {self.shape} and {other.shape} cannot be joined")
        if self.is_empty or other.is_empty:
            kept = other if self.is_empty else self
            if kept.kv_heads == self.kv_heads:
                return kept
            return Mask(self.shape, self.kv_heads, lists=kept.lists(), is_filled=kept.is_filled)
        filled = self.is_filled or other.is_filled
        if other._apart_from is self:
            lists = other._joined or append(self.lists(), other.lists())
            return Mask(self.shape, self.kv_heads, lists=lists, is_filled=filled)
        if self._dense is not None and other._dense is not None and self.is_certain and other.is_certain:
            heads = max(self.shared_heads, other.shared_heads)
            both = expand_heads(self.chosen(), heads) | expand_heads(other.chosen(), heads)
            return Mask.from_dense(both, self.shape[1], self.kv_heads, filled)
        joined = join(self.lists(), other.lists(), self.shape[3], self.chosen)
        return Mask(self.shape, self.kv_heads, lists=joined, is_filled=filled)

    def narrow(self, stays: Tensor) -> Mask:
        """This mask with only those keys that stay: bool (B, H, Q, K), for each query head in the order of `lists()`."""
        lists = self.lists()
        indices = expand_heads(lists.indices, stays.shape[1]).masked_fill(~stays, -1)
        probability = None if lists.probability is None else expand_heads(lists.probability, stays.shape[1])
        return Mask(self.shape, self.kv_heads, lists=from_indices(indices, probability))

    def restrict(self, allowed: Tensor) -> Mask:
        """This mask without the keys that are not allowed. allowed: bool (B, 1, Q, N)."""
        dense = self.chosen() & allowed if self.is_certain else self.inclusion_probability() * allowed
        return Mask.from_dense(dense, self.shape[1], self.kv_heads)
