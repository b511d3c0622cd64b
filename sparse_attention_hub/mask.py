"""Mask: which keys each query attends to, and with what inclusion probability."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


class Mask:
    """Inclusion probabilities p in [0, 1] for every (batch, query head, query, key); 0 = not attended.

    The softmax term of an attended key is weighted by 1/p. A mask is a value: no method changes it. It is held as index
    lists (cheap for a few keys out of many), as a dense tensor, or both; the missing form is made when first asked for.

    Index lists have shape (B, h, Q, K), -1 = padding, no key twice in a row. h is H, or 1 when all heads share the
    lists, or the number of kv heads when the query heads of a group share them: sharing is what saves KV reads.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        *,
        indices: Tensor | None = None,
        probability: Tensor | None = None,
        dense: Tensor | None = None,
        kv_heads: int | None = None,
        counts: Tensor | None = None,
    ) -> None:
        """Use `empty`, `from_indices` or `from_dense` instead."""
        self.shape = shape
        self.kv_heads = kv_heads if kv_heads is not None else shape[1]
        self._indices = indices
        self._probability = probability
        self._held_dense = dense
        self._chosen: Tensor | None = None
        self._rows: tuple[Tensor, Tensor | None] | None = None
        self._residual: tuple[Tensor, Tensor] | None = None
        self._counts = counts
        #: What `from_range` was given.
        self.span: tuple[int, int] | None = None
        #: Where keys were drawn at one rate a row: what `from_draw` was given.
        self.draw: tuple[Tensor, Tensor, Tensor] | None = None

    # -- making masks ------------------------------------------------------------------------------------------------

    @staticmethod
    def empty(shape: tuple[int, int, int, int], device: torch.device | str = "cpu", kv_heads: int | None = None) -> Mask:
        """Nothing is attended. shape: (B, H, Q, N)."""
        batch, _, rows, _ = shape
        indices = torch.empty((batch, 1, rows, 0), dtype=torch.int64, device=device)
        return Mask(shape, indices=indices, kv_heads=kv_heads)

    @staticmethod
    def from_indices(
        indices: Tensor, shape: tuple[int, int, int, int], probability: Tensor | None = None, kv_heads: int | None = None
    ) -> Mask:
        """indices: integer (B, h, Q, K), -1 = padding, distinct in a row; h is 1, kv_heads or H.

        probability: float (B, h, Q, K) inclusion probabilities of those keys, None = certain.
        Raises ValueError if the shapes do not fit.
        """
        heads = {1, shape[1]} | ({kv_heads} if kv_heads else set())
        if indices.dim() != 4 or indices.shape[0] != shape[0] or indices.shape[2] != shape[2]:
            raise ValueError(f"indices must be (B, h, Q, K) = ({shape[0]}, h, {shape[2]}, K), got {tuple(indices.shape)}")
        if indices.shape[1] not in heads:
            raise ValueError(f"indices must have {sorted(heads)} heads, got {indices.shape[1]}")
        if probability is not None and probability.shape != indices.shape:
            raise ValueError(f"probability must be {tuple(indices.shape)}, got {tuple(probability.shape)}")
        if probability is not None:
            probability = probability.float()
        return Mask(shape, indices=indices.long(), probability=probability, kv_heads=kv_heads)

    @staticmethod
    def from_range(
        start: int, stop: int, shape: tuple[int, int, int, int], device: torch.device | str = "cpu", kv_heads: int | None = None
    ) -> Mask:
        """The keys from `start` up to `stop`, the same for all items, heads and rows."""
        indices = torch.arange(start, stop, device=device).expand(shape[0], 1, shape[2], -1)
        counts = torch.full((shape[0], 1, shape[2]), stop - start, device=device)
        mask = Mask(shape, indices=indices, kv_heads=kv_heads, counts=counts)
        mask.span = (start, stop)
        return mask

    @staticmethod
    def from_dense(dense: Tensor, heads: int | None = None, kv_heads: int | None = None, counts: Tensor | None = None) -> Mask:
        """dense: bool (attended or not) or float inclusion probabilities, (B, H, Q, N), or (B, 1, Q, N) with `heads`.

        counts: attended keys of each row (B, h, Q), where the caller knows them anyway.
        """
        if dense.dim() != 4:
            raise ValueError(f"a dense mask must be (B, H, Q, N), got {tuple(dense.shape)}")
        batch, given, rows, keys = dense.shape
        heads = heads if heads is not None else given
        known = {1, heads} | ({kv_heads} if kv_heads else set())
        if given not in known:
            raise ValueError(f"a dense mask must have {sorted(known)} heads, got {given}")
        if dense.dtype != torch.bool:
            dense = dense.float()
        return Mask((batch, heads, rows, keys), dense=dense, kv_heads=kv_heads, counts=counts)

    @staticmethod
    def from_draw(sure: Tensor, drawn: Tensor, rate: Tensor, heads: int, kv_heads: int, counts: Tensor) -> Mask:
        """Keys attended for certain beside keys that were drawn at one inclusion probability a row.

        sure: bool (B, h, Q, N); drawn: bool (B, h', Q, N), h' a multiple of h, no key in both. rate: float32 (B, h', Q, 1),
        read where something was drawn. counts: attended keys of each row, int64 (B, h', Q).
        """
        batch, _, rows, keys = drawn.shape
        mask = Mask((batch, heads, rows, keys), kv_heads=kv_heads, counts=counts)
        mask.draw = (sure, drawn, rate)
        return mask

    # -- reading masks -----------------------------------------------------------------------------------------------

    @property
    def _dense(self) -> Tensor | None:
        if self._held_dense is None and self.draw is not None:
            sure, drawn, rate = self.draw
            self._held_dense = drawn * rate + expand_heads(sure, drawn.shape[1])
        return self._held_dense

    @property
    def device(self) -> torch.device:
        if self.draw is not None:
            return self.draw[0].device
        return (self._indices if self._indices is not None else self._dense).device  # type: ignore[union-attr]

    @property
    def is_empty(self) -> bool:
        """True if no masker has chosen anything yet (known by construction, values are not searched)."""
        return self._indices is not None and self._indices.shape[-1] == 0

    @property
    def is_certain(self) -> bool:
        """True if every attended key is attended for certain (p = 1), known by construction."""
        held = self._held_dense
        return self._probability is None and self.draw is None and (held is None or held.dtype == torch.bool)

    @property
    def shared_heads(self) -> int:
        """In how many separate head rows the mask is held: 1, kv_heads or H."""
        if self.draw is not None:
            return self.draw[1].shape[1]
        return (self._indices if self._indices is not None else self._dense).shape[1]  # type: ignore[union-attr]

    def chosen(self) -> Tensor:
        """bool (B, h, Q, N), True where p > 0; h as the mask is held (1, kv_heads or H)."""
        if self._chosen is None:
            if self.draw is not None:
                self._chosen = self.draw[1] | expand_heads(self.draw[0], self.draw[1].shape[1])
            elif self._dense is not None:
                self._chosen = self._dense if self._dense.dtype == torch.bool else self._dense > 0
            else:
                self._chosen = self._scatter(torch.bool, True)
        return self._chosen

    def inclusion_probability(self) -> Tensor:
        """float32 (B, H, Q, N)."""
        return expand_heads(self.held_probability(), self.shape[1])

    def held_probability(self) -> Tensor:
        """Inclusion probabilities for as many heads as the mask is held in: float32 (B, h, Q, N)."""
        if self._dense is not None:
            return self._dense.float()
        if self._probability is not None:
            return self._scatter(torch.float32, self._probability)
        return self.chosen().float()

    def residual(self, allowed: Tensor) -> Tensor:
        """Allowed keys that nothing chose: bool (B, h, Q, N), h as the mask is held. allowed: bool (B, 1, Q, N)."""
        if self.is_empty:
            return allowed
        if self._residual is None or self._residual[0] is not allowed:
            self._residual = (allowed, torch.gt(allowed, self.chosen()))  # allowed and not chosen, in one pass
        return self._residual[1]

    def counts(self) -> Tensor:
        """Attended keys of each row: int64 (B, h, Q)."""
        if self._counts is None:
            self._counts = (self._indices >= 0 if self._indices is not None else self.chosen()).sum(-1)
        return self._counts

    def group_counts(self) -> Tensor:
        """Distinct keys that the query heads of one kv head attend to, row by row: int64 (B, kv_heads or 1, Q)."""
        if self.shared_heads in (1, self.kv_heads):
            return self.counts()
        batch, heads, rows, keys = self.shape
        if self._indices is not None and self._chosen is None:
            grouped = self._indices.view(batch, self.kv_heads, heads // self.kv_heads, rows, -1)
            lists = grouped.transpose(2, 3).reshape(batch, self.kv_heads, rows, -1)
            return _scattered(lists, keys, True, torch.bool).sum(-1)
        members = self.chosen().view(batch, self.kv_heads, heads // self.kv_heads, rows, keys).unbind(2)
        return functools.reduce(torch.bitwise_or, members).sum(-1)

    def to_indices(self, group: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Index lists for kernels: the first `count` entries of a row are keys, the rest is padding (0).

        group=False: idx int32 (B, H, Q, K), count int32 (B, H, Q), log_weight = -log p float32 (B, H, Q, K), -inf on padding,
        or None (all 0).
        group=True: one list a kv head, the union over its query heads and rows: idx int32 (B, kv_heads, K),
        count int32 (B, kv_heads), log_weight float32 (B, H, Q, K), -inf where that row did not choose the key.
        """
        if group:
            return self._group_indices()
        indices, probability = self.rows()
        indices = expand_heads(indices, self.shape[1])
        padded = indices < 0
        count = (~padded).sum(-1, dtype=torch.int32)
        # Stable: keys keep their order, padding goes to the end.
        order = padded.to(torch.uint8).argsort(dim=-1, stable=True)
        packed = indices.gather(-1, order).clamp(min=0)
        log_weight = None
        if probability is not None:
            log_weight = -expand_heads(probability, self.shape[1]).gather(-1, order).clamp(min=1e-30).log()
            log_weight = log_weight.masked_fill(padded.gather(-1, order), float("-inf"))
        width = int(count.max()) if count.numel() else 0
        packed, log_weight = packed[..., :width], None if log_weight is None else log_weight[..., :width]
        return packed.int(), count, log_weight

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """(indices (B, h, Q, K) with -1 padding in any place, probability (B, h, Q, K) or None), as the mask is held."""
        if self._indices is not None:
            return self._indices, self._probability
        # Kept beside the mask, not as its form: how two masks join must not depend on who looked at one of them before.
        if self._rows is None:
            chosen = self.chosen()
            counts = chosen.sum(-1)
            width = int(counts.max()) if counts.numel() else 0
            where = chosen.nonzero(as_tuple=True)
            slot = (chosen.cumsum(-1) - 1)[where]
            indices = torch.full((*chosen.shape[:3], width), -1, dtype=torch.int64, device=chosen.device)
            indices[where[0], where[1], where[2], slot] = where[3]
            certain = self._dense is None or self._dense.dtype == torch.bool
            self._rows = indices, None if certain else self._dense.gather(-1, indices.clamp(min=0))  # type: ignore[union-attr]
        return self._rows

    # -- combining masks ---------------------------------------------------------------------------------------------

    def union(self, other: Mask, disjoint: bool = False) -> Mask:
        """Attended if either attends. Two probabilities join as those of independent coins, p + q - pq; certain stays certain.

        disjoint: the caller knows that no key is in both (it chose among the residual), which saves looking.
        Raises ValueError if the shapes differ.
        """
        if self.shape != other.shape:
            raise ValueError(f"masks of shapes {self.shape} and {other.shape} cannot be joined")
        if other.is_empty:
            return self
        if self.is_empty:
            return other if other.kv_heads == self.kv_heads else other._with_kv_heads(self.kv_heads)
        if self._indices is None or other._indices is None or not (self.is_certain or other.is_certain):
            return self._dense_union(other, disjoint)
        sure, maybe = (self, other) if self.is_certain else (other, self)
        heads = max(sure.shared_heads, maybe.shared_heads)
        first, second = expand_heads(sure._indices, heads), expand_heads(maybe._indices, heads)  # type: ignore[arg-type]
        counts = None
        if disjoint or _apart(self.span, other.span):
            counts = self._sum_of_counts(other)
        else:
            # A key that both hold is certain, so the other list drops it.
            already = expand_heads(sure.chosen(), heads).gather(-1, second.clamp(min=0))
            second = second.masked_fill(already, -1)
        probability = None
        if maybe._probability is not None:
            drawn = expand_heads(maybe._probability, heads)
            probability = torch.cat([torch.ones_like(first, dtype=torch.float32), drawn], -1)
        both = torch.cat([first, second], -1)
        return Mask(self.shape, indices=both, probability=probability, kv_heads=self.kv_heads, counts=counts)

    def restrict(self, allowed: Tensor) -> Mask:
        """This mask without the keys that are not allowed. allowed: bool (B, 1, Q, N)."""
        if self._indices is not None:
            permitted = allowed.expand(-1, self._indices.shape[1], -1, -1).gather(-1, self._indices.clamp(min=0))
            indices = self._indices.masked_fill(~permitted, -1)
            return Mask(self.shape, indices=indices, probability=self._probability, kv_heads=self.kv_heads)
        assert self._dense is not None
        dense = self._dense & allowed if self._dense.dtype == torch.bool else self._dense * allowed
        return Mask(self.shape, dense=dense, kv_heads=self.kv_heads)

    def _with_kv_heads(self, kv_heads: int) -> Mask:
        mask = Mask(self.shape, indices=self._indices, probability=self._probability, dense=self._held_dense, kv_heads=kv_heads)
        mask.draw, mask.span, mask._counts = self.draw, self.span, self._counts
        return mask

    def _dense_union(self, other: Mask, disjoint: bool) -> Mask:
        counts = self._sum_of_counts(other) if disjoint else None
        if self.is_certain and other.is_certain:
            heads = max(self.shared_heads, other.shared_heads)
            both = expand_heads(self.chosen(), heads) | expand_heads(other.chosen(), heads)
        else:
            p, q = self.inclusion_probability(), other.inclusion_probability()
            both = p + q - p * q
        return Mask.from_dense(both, self.shape[1], self.kv_heads, counts)

    def _sum_of_counts(self, other: Mask) -> Tensor | None:
        """Counts of the union of two masks that share no key, where counting costs little."""
        if not (self._counts_known and other._counts_known):
            return None
        heads = max(self.shared_heads, other.shared_heads)
        return expand_heads(self.counts(), heads) + expand_heads(other.counts(), heads)

    @property
    def _counts_known(self) -> bool:
        """Whether counting costs little: counted already, or held for one head only."""
        return self._counts is not None or self.shared_heads == 1

    def _scatter(self, dtype: torch.dtype, value: Tensor | bool) -> Tensor:
        """Index lists to a dense (B, h, Q, N)."""
        assert self._indices is not None
        return _scattered(self._indices, self.shape[3], value.to(dtype) if isinstance(value, Tensor) else value, dtype)

    def _group_indices(self) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, rows, keys = self.shape
        chosen = expand_heads(self.chosen(), heads)
        union = chosen.reshape(batch, self.kv_heads, -1, keys).any(2)
        count = union.sum(-1)
        width = int(count.max()) if count.numel() else 0
        order = (~union).to(torch.uint8).argsort(dim=-1, stable=True)[..., :width]
        lists = order.repeat_interleave(heads // self.kv_heads, 1).unsqueeze(2).expand(-1, -1, rows, -1)
        attended = chosen.gather(-1, lists)
        if self.is_certain:
            log_weight = torch.zeros(attended.shape, device=attended.device)
        else:
            log_weight = -self.inclusion_probability().gather(-1, lists).clamp(min=1e-30).log()
        log_weight = log_weight.masked_fill(~attended, float("-inf"))
        return order.int(), count.int(), log_weight


def _scattered(indices: Tensor, keys: int, value: Tensor | bool, dtype: torch.dtype) -> Tensor:
    """`value` where index lists (B, h, Q, K) point, 0 elsewhere: (B, h, Q, keys). Padding (-1) lands in a column before the
    first, which is cut off."""
    out = torch.zeros((*indices.shape[:3], keys + 1), dtype=dtype, device=indices.device)
    return out.scatter_(-1, indices + 1, value)[..., 1:]


def _apart(first: tuple[int, int] | None, second: tuple[int, int] | None) -> bool:
    """Whether two ranges are known, and share nothing."""
    return first is not None and second is not None and (first[1] <= second[0] or second[1] <= first[0])


def expand_heads(tensor: Tensor, heads: int) -> Tensor:
    """(B, h, ...) to (B, heads, ...): h = 1 is shared by all heads, otherwise each of the h rows serves heads/h in turn."""
    held = tensor.shape[1]
    if held == heads:
        return tensor
    if held == 1:
        return tensor.expand(-1, heads, *tensor.shape[2:])
    return tensor.repeat_interleave(heads // held, dim=1)
