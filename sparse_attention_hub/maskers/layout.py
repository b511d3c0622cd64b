"""What follows from a call's shapes and attention mask alone: allowed keys, positions, lengths."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..lists import KeyLists, expand_heads
from ..mask import Mask
from .call_cache import once

# An additive mask forbids a key where it is at most this; smaller penalties are a bias, which is added to the scores.
FORBIDDEN_BIAS = -1e4
NEVER = float("-inf")


class Layout:
    """shape: (B, H, Q, N). attention_mask: additive or bool (True = allowed), broadcastable to
    (B, 1, Q, N); None = the queries are the last Q positions and attention is causal.

    rows_after: without a mask, queries of the same call that come after these Q ones. A long call is done in blocks of rows; sizes
    and codes are those of the whole call.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        kv_heads: int,
        device: torch.device,
        attention_mask: Tensor | None = None,
        rows_after: int = 0,
    ) -> None:
        self.shape, self.kv_heads, self.device = shape, kv_heads, device
        end = shape[3] - rows_after
        self._own = slice(end - shape[2], end)  # positions of the queries, without a mask
        self.mask = None if attention_mask is None else attention_mask[..., : shape[3]]
        #: How many keys there are, on the device, where the tensors have room for more: see open_layout.py.
        self.length: Tensor | None = None
        #: What leading maskers chose that go by positions alone: made once for all calls of this layout.
        self.chosen: dict[Hashable, Mask] = {}
        self._sizes: dict[Hashable, Tensor] = {}

    @cached_property
    def allowed(self) -> Tensor:
        """bool (B, 1, Q, N): what the causal and padding masks permit."""
        batch, _, rows, keys = self.shape
        if self.mask is None and self.all_allowed:
            allowed = torch.ones(keys, dtype=torch.bool, device=self.device)
        elif self.mask is None:
            position = torch.arange(keys, device=self.device)
            allowed = position <= position[self._own].unsqueeze(-1)
        else:
            allowed = self.mask if self.mask.dtype == torch.bool else self.mask > FORBIDDEN_BIAS
        return allowed.expand(batch, 1, rows, keys)

    @cached_property
    def all_allowed(self) -> bool:
        """True if every query may attend to every key (plain decoding)."""
        return self._own.start == self.shape[3] - 1 if self.mask is None else bool(self.allowed.all())

    @cached_property
    def known_keys(self) -> Tensor | None:
        """Keys that codes may be made of, those that an item's last row may attend to: bool (B, N), None = all."""
        return None if self.mask is None or self.all_allowed else self._last

    @cached_property
    def _last(self) -> Tensor:
        """What the last row of each item may attend to, of its rows that have keys (those of padding may have none): bool (B, N)."""
        has_keys = (self.row_lengths > 0).flip(-1).to(torch.uint8)
        place = self.shape[2] - 1 - has_keys.argmax(-1)
        return self.allowed[torch.arange(self.shape[0], device=self.device), 0, place]

    @cached_property
    def n_allowed(self) -> list[int]:
        """N of each item: the allowed keys of its last query row that has any. Fractional sizes are fractions of it."""
        if self.mask is None:
            return [self.shape[3]] * self.shape[0]
        return self._last.sum(-1).tolist()

    @cached_property
    def totals(self) -> Tensor:
        """`n_allowed` as sizes: int64 (B, 1, 1) on the CPU."""
        return torch.tensor(self.n_allowed).view(-1, 1, 1)

    @cached_property
    def key_positions(self) -> Tensor:
        """Position of each key among the keys its item may use, counted without padding: int64 (B, N), -1 on padding."""
        if self.mask is None:
            return torch.arange(self.shape[3], device=self.device).expand(self.shape[0], -1)
        # Under causality the last row sees what any row sees; a banded mask hides early keys from it.
        usable = self.allowed[:, 0].any(1)
        return (usable.cumsum(-1) - 1).masked_fill(~usable, -1)

    @cached_property
    def row_positions(self) -> Tensor:
        """Position of each query row, that of the last key it may attend to: int64 (B, Q), -1 without allowed keys."""
        if self.mask is None:
            return self.key_positions[:, self._own]
        return self.key_positions.unsqueeze(1).masked_fill(~self.allowed[:, 0], -1).amax(-1)

    @cached_property
    def row_lengths(self) -> Tensor:
        """Allowed keys of each query row: int64 (B, Q)."""
        return self.allowed[:, 0].sum(-1)

    @cached_property
    def unusable(self) -> Tensor | None:
        """bool (B, N), True for keys that no row may attend to; None where there are none."""
        unusable = self.key_positions < 0
        return unusable if self.mask is not None and bool(unusable.any()) else None

    def usable(self, tensor: Tensor) -> Tensor:
        """Keys or values (B, h, N, D), 0 where no row may look."""
        return tensor if self.unusable is None else tensor.masked_fill(self.unusable[:, None, :, None], 0.0)

    @cached_property
    def bias(self) -> Tensor | None:
        """What the attention mask adds to the scores of allowed keys: float32 (B, 1, Q, N), 0 elsewhere; None for nothing."""
        if self.mask is None or self.mask.dtype == torch.bool:
            return None
        bias = self.mask.float().expand(self.allowed.shape).masked_fill(~self.allowed, 0.0)
        return bias if bool(bias.any()) else None

    def first_keys(self, sizes: Tensor, most: int | None = None) -> Mask:
        """The first keys of each item, as far as a row may see them. sizes: int64 (B, h, 1), see `resolve`; most: no size is above
        it, which the host must know where sizes are on the device."""
        if self.shape[2] == 1 and self.all_allowed and sizes.shape[1] == 1:  # one range of keys for all heads and items
            return Mask.from_range(0, int(sizes[0]), self.shape, self.device, self.kv_heads)
        limit = sizes.to(self.device, non_blocking=True).unsqueeze(-1)
        flags = (self.key_positions[:, None, None, :] < limit) & self.allowed
        return Mask.from_dense(flags, self.shape[1], self.kv_heads)

    def last_keys(self, sizes: Tensor, most: int | None = None) -> Mask:
        """Of each row the most recent keys, its own included: those in (i - size, i] for a row at position i.
        sizes, most: as in `first_keys`."""
        if self.shape[2] == 1 and self.all_allowed and sizes.shape[1] == 1:
            total = self.shape[3]
            return Mask.from_range(total - int(sizes[0]), total, self.shape, self.device, self.kv_heads)
        age = self.row_positions[:, None, :, None] - self.key_positions[:, None, None, :]
        limit = sizes.to(self.device, non_blocking=True).unsqueeze(-1)
        return Mask.from_dense((age < limit) & self.allowed, self.shape[1], self.kv_heads, is_filled=True)  # each row's own key

    def keys_from(self, first: int, most: int | None = None) -> Mask:
        """The allowed keys from one on. most: as in `first_keys`."""
        if self.all_allowed:
            return Mask.from_range(first, self.shape[3], self.shape, self.device, self.kv_heads)
        later = torch.arange(self.shape[3], device=self.device) >= first
        return Mask.from_dense(self.allowed & later, self.shape[1], self.kv_heads)

    def biased(self, scores: Tensor) -> Tensor:
        """scores (B, H, Q, N) plus the attention mask's bias, -inf where not allowed; changed in place."""
        if self.bias is not None:
            scores += self.bias
        if not self.all_allowed:
            first = 0 if self.mask is not None else self._own.start + 1  # the first key that not every row may attend to
            closed = ~self.allowed[..., first:]
            scores[..., first:].masked_fill_(closed, NEVER)  # not added: what stands on padding may be anything, NaN too
        return scores

    def share_of_allowed(self, counts: Tensor) -> float | Tensor:
        """counts (B, h, Q) / allowed keys: mean over heads and rows; rows without allowed keys stay out. Off the CPU a float64 number
        on the device: reading it is a wait."""
        on_cpu = counts.device.type == "cpu"
        if self.all_allowed:
            return (float(counts.sum()) if on_cpu else counts.sum(dtype=torch.float64)) / (counts.numel() * self.shape[3])
        lengths = self.row_lengths.float()
        shares = counts.float().mean(1) / lengths.masked_fill(lengths == 0, float("nan"))
        return float(shares.nanmean()) if on_cpu else shares.nanmean().double()

    def resolve(self, size: int | float, factors: Tensor | None = None) -> Tensor:
        """A size in tokens (int) or as a fraction of N (float, floored, at least 1), for each item: int64 (B, h, 1) on the CPU.

        factors: on fractions, float64 (h,), h = 1, kv heads or H; None = 1 for all heads.
        """
        if factors is not None:
            return resolve_size(size, self.n_allowed, factors)
        return once(self._sizes, (type(size), size), lambda: resolve_size(size, self.n_allowed))

    def most(self, size: int | float, factors: Tensor | None = None) -> int | None:
        """The largest that `resolve` may give, where only the device knows it; None = the host does."""
        return None

    def share_of(self, counts: Tensor, size: int | float, factors: Tensor | None = None) -> Tensor:
        """The same as a fraction of counts int64 (B, h, Q), where they are, instead of N; floored, 0 included: int64 (B, h, Q)."""
        if isinstance(size, int):
            return torch.full_like(counts, size)
        if factors is None:
            return (counts * size).long()
        factors = on_device(tuple(factors.tolist()), torch.float64, counts.device).view(1, -1, 1)
        heads = max(counts.shape[1], factors.shape[1])
        return (expand_heads(counts, heads) * (expand_heads(factors, heads) * size).clamp(max=1.0)).long()

    @cached_property
    def last_allowed(self) -> Tensor:
        """The last allowed key of each row: int64 (B, 1, Q)."""
        return self.shape[3] - 1 - self.allowed.flip(-1).to(torch.uint8).argmax(-1)

    def fill_empty_rows(self, mask: Mask) -> tuple[Mask, int | Tensor]:
        """Rows that attend to nothing attend to their last allowed key. Returns the mask and how many rows that were, on a device as
        a number there."""
        if mask.is_filled:
            return mask, 0
        counts = mask.counts()
        waits = counts.device.type == "cpu" or self.shape[2] > 1  # else a key more in each list, often padding
        if waits and int(counts.min()) > 0:
            return mask, 0
        empty = (counts == 0) & (self.row_lengths.unsqueeze(1) > 0)
        rows = expand_heads(empty, self.shape[1]).sum()
        if waits and int(rows) == 0:
            return mask, 0
        indices = self.last_allowed.expand_as(empty).masked_fill(~empty, -1).unsqueeze(-1).int()
        filled = Mask(self.shape, self.kv_heads, lists=KeyLists(indices, empty.int()), apart_from=mask)
        return mask.union(filled), int(rows) if waits else rows

    def everything(self) -> Mask:
        """Every allowed key."""
        if self.shape[2] == 1 and self.all_allowed:
            return Mask.from_range(0, self.shape[3], self.shape, self.device, self.kv_heads)
        return Mask.from_dense(self.allowed, self.shape[1], self.kv_heads, is_filled=True)


def resolve_size(size: int | float, totals: list[int], factors: Tensor | None = None) -> Tensor:
    """See Layout.resolve; totals: N of each item."""
    if isinstance(size, int):
        return torch.tensor([[[min(n, size)]] for n in totals])
    shares = [size] if factors is None else (size * factors).tolist()
    return torch.tensor([[[min(n, max(1, int(share * n)))] for share in shares] for n in totals])


@lru_cache(maxsize=2**14)  # factors of 500 configurations in 32 layers
def on_device(numbers: tuple[int | float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on a device, copied once: a copy in each step would keep it from being a CUDA graph."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)


def end_of_allowed(allowed: Tensor) -> int:
    """One past the last allowed key of the item where it comes first. allowed: bool (B, N)."""
    ends = allowed.shape[-1] - allowed.flip(-1).to(torch.uint8).argmax(-1)
    return int(ends.masked_fill(~allowed.any(-1), allowed.shape[-1]).min())


def check_call(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
    """ValueError for tensors that do not fit, or a mask that would be misread."""
    shapes = f"{tuple(queries.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}"
    if queries.dim() != 4 or keys.dim() != 4 or values.dim() != 4:
        raise ValueError(f"queries must be (B, H, Q, D), keys and values (B, Hkv, N, D), got {shapes}")
    if queries.shape[1] % keys.shape[1] or queries.shape[0] != keys.shape[0] or keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"query heads must be a multiple of kv heads and batches equal, got queries, keys, values {shapes}")
    if queries.shape[-1] != keys.shape[-1]:
        raise ValueError(f"queries and keys must have one width, got {queries.shape[-1]} and {keys.shape[-1]}")
    batch, rows, total = queries.shape[0], queries.shape[2], keys.shape[2]
    if mask is None:
        if rows > total:
            raise ValueError(f"{rows} queries cannot be the last of {total} keys; pass attention_mask")
        return
    shape = tuple(mask.shape)
    fits = mask.dim() == 4 and shape[0] in (1, batch) and shape[1] == 1 and shape[2] in (1, rows) and shape[3] >= total
    # A mask of integers says 0 and 1, as tokenizers do: it would be added.
    if not fits or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        raise ValueError(
            f"attention_mask must be bool (True = may be attended) or floating (added to scores), of shape "
            f"({batch}, 1, {rows}, {total}), got {mask.dtype} {shape}"
        )
