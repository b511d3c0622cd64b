"""The layout of a decode step that runs as it is for any number of keys: a CUDA graph of it serves all steps of an answer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.select import count_up
from ..lists import KeyLists
from ..mask import Mask
from .call_cache import once
from .layout import NEVER, Layout, on_device


class OpenLayout(Layout):
    """One query row, the last of `length` keys, of one item without padding. Keys and values have room for N keys; how many there
    are, only the device knows: a tensor without dimensions, int64. What depends on it is computed there, and lists are as long as
    the largest N asks for.

    Only maskers with `in_graphs` are given one.
    """

    all_allowed = False
    known_keys = unusable = None

    def __init__(self, shape: tuple[int, int, int, int], kv_heads: int, device: torch.device, length: Tensor) -> None:
        super().__init__(shape, kv_heads, device)
        self.length: Tensor = length
        self.allowed = (count_up(shape[3], device) < length).view(1, 1, 1, -1)
        self.free = ~self.allowed
        self.totals = length.view(1, 1, 1)
        self.row_lengths = length.view(1, 1)
        self.row_positions = self.row_lengths - 1
        self.last_allowed = self.totals - 1

    def first_keys(self, sizes: Tensor, most: int | None = None) -> Mask:
        assert most is not None
        return self._mask(count_up(most, self.device), torch.minimum(sizes, self.totals))

    def last_keys(self, sizes: Tensor, most: int | None = None) -> Mask:
        assert most is not None
        newest_first = self.row_positions.view(1) - count_up(most, self.device)
        return self._mask(newest_first, torch.minimum(sizes, self.totals), is_filled=True)

    def keys_from(self, first: int | Tensor, most: int | None = None) -> Mask:
        """See Layout.keys_from. first: maybe on the device, int64 (1,)."""
        assert most is not None
        return self._mask(first + count_up(most, self.device), self.totals - first)

    def everything(self) -> Mask:
        return self._mask(count_up(self.shape[3], self.device), self.totals, is_filled=True)

    def _mask(self, keys: Tensor, counts: Tensor, is_filled: bool = False) -> Mask:
        """The first of these keys (K,) for each head: counts int64 (1, h, 1)."""
        places = count_up(keys.shape[0], self.device)
        indices = torch.where(places < counts.unsqueeze(-1), keys, -1).int()
        return Mask(self.shape, self.kv_heads, lists=KeyLists(indices, counts.int()), is_filled=is_filled)

    @property
    def n_allowed(self) -> list[int]:
        raise RuntimeError("only the device knows how many keys there are: read `totals` (see Masker.in_graphs)")

    def biased(self, scores: Tensor) -> Tensor:
        return scores.masked_fill_(self.free, NEVER)

    def share_of_allowed(self, counts: Tensor) -> float | Tensor:
        return counts.sum(dtype=torch.float64) / (counts.numel() * self.length)

    def resolve(self, size: int | float, factors: Tensor | None = None) -> Tensor:
        """See Layout.resolve; on the device."""
        own = None if factors is None or isinstance(size, int) else tuple(factors.tolist())

        def make() -> Tensor:
            if isinstance(size, int):
                return self.totals.clamp(max=size)
            share = size if own is None else on_device(own, torch.float64, self.device).view(1, -1, 1) * size
            return torch.minimum((self.totals.double() * share).long().clamp(min=1), self.totals)

        return once(self._sizes, (type(size), size, own), make)

    def most(self, size: int | float, factors: Tensor | None = None) -> int:
        share = size if factors is None or isinstance(size, int) else float((size * factors).max())
        return min(self.shape[3], share if isinstance(share, int) else max(1, int(share * self.shape[3])))
