"""Drawing keys without replacement, in the random order that all configurations of a call share."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from ..mask import Mask, expand_heads
from .inputs import AttentionInputs, count_true

# Places around a guess in which the bound of a draw is looked for: a few standard deviations of the guess.
_WINDOW = 192


def draws_by_comparison(inputs: AttentionInputs, mask: Mask) -> bool:
    """Whether many rows draw: then a key is drawn if its place in the random order lies below its row's bound, and no lists
    are made. In NumPy, on a CPU."""
    return inputs.shape[2] > 1 and mask.is_certain and inputs.device.type == "cpu"


class OrderedResidual:
    """The residual keys of many rows in the call's random order. residual: bool (B, h, Q, N). In NumPy, on a CPU.

    left: residual keys of each row, int64 (B, h', Q), h' = max(h, kv heads).
    """

    def __init__(self, inputs: AttentionInputs, residual: Tensor) -> None:
        held = residual.shape[1]
        self._kv_heads = inputs.kv_heads
        self.heads = max(held, inputs.kv_heads)
        self.left = expand_heads(torch.from_numpy(count_true(residual.numpy())), self.heads)
        self._places = inputs.random_places()[:, :, None]
        self._order = inputs.random_order().numpy()[:, :, None]
        self._residual = residual.numpy()[:, :, None] if held == 1 else self._grouped(residual)

    def first(self, sizes: Tensor) -> Tensor:
        """The first sizes (B, H or h', Q) residual keys of each row as flags: bool (B, H or h', Q, N).

        A key is among them if its place lies below its row's bound. Residual keys are spread evenly over a random order, so
        a bound is guessed, the keys below it counted, and what is missing read off the order near the guess: no sorting.
        """
        wanted = self._grouped(sizes.unsqueeze(-1))
        left = self._grouped(expand_heads(self.left, sizes.shape[1]).unsqueeze(-1))
        keys = self._places.shape[-1]
        bounds = np.ceil(wanted * keys / np.maximum(left, 1)).astype(np.int64)
        low, high = np.zeros_like(bounds), np.full_like(bounds, keys)
        for turn in itertools.count():
            drawn = np.less(self._places, bounds.astype(self._places.dtype))
            drawn &= self._residual
            counts = count_true(drawn)[..., None]
            if (counts == wanted).all():
                return torch.from_numpy(drawn.reshape(*sizes.shape, keys))
            low, high = np.where(counts < wanted, bounds, low), np.where(counts > wanted, bounds, high)
            bounds, inside = self._read_off(bounds, counts, wanted)
            jump = bounds + (wanted - counts) * keys // np.maximum(left, 1)
            halved = (jump <= low) | (jump >= high) | (turn % 2 == 1)
            bounds = np.where(inside, bounds, np.where(halved, (low + high) // 2, jump))
        raise AssertionError("unreachable")

    def _read_off(self, bounds: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(bounds below which `wanted` residual keys lie, where they stand near enough to be seen). All (..., 1)."""
        keys = self._places.shape[-1]
        width = min(_WINDOW, keys)
        start = np.clip(bounds - width // 2, 0, keys - width)
        seen = start + np.arange(width)
        shape = (*bounds.shape[:-1], keys)
        upcoming = np.take_along_axis(np.broadcast_to(self._order, shape), seen, -1)
        running = np.take_along_axis(np.broadcast_to(self._residual, shape), upcoming, -1).cumsum(-1)
        before = np.where(bounds > start, np.take_along_axis(running, np.maximum(bounds - start - 1, 0), -1), 0)
        lacking = wanted - (counts - before)
        inside = (lacking >= 0) & (lacking <= running[..., -1:])
        found = start + (running < lacking).sum(-1, keepdims=True) + (lacking > 0)
        return np.where(inside, found, bounds), inside

    def _grouped(self, held: Tensor | np.ndarray) -> np.ndarray:
        """(B, h', Q, n) to (B, Hkv, h' / Hkv, Q, n)."""
        array = np.asarray(held)
        return array.reshape(array.shape[0], self._kv_heads, array.shape[1] // self._kv_heads, *array.shape[2:])


def listed(flags: Tensor, counts: Tensor) -> Tensor:
    """Where flags (B, h, Q, N) are set: int64 (B, h, Q, most of a row), -1 = padding. counts (B, h, Q): flags set in each row."""
    taken = np.arange(int(counts.max())) < counts.numpy()[..., None]
    indices = np.full(taken.shape, -1)
    indices[taken] = np.flatnonzero(flags.numpy()) % flags.shape[-1]
    return torch.from_numpy(indices)


def draw_without_replacement(inputs: AttentionInputs, residual: Tensor, sizes: Tensor, skip: Tensor | None = None) -> Mask:
    """The first `sizes` residual keys in the call's random order, after the first `skip` of them.

    residual: bool (B, h, Q, N); sizes and skip: int64 broadcastable to (B, h, Q). Each key's p = size / keys to draw from.
    """
    order = inputs.random_order()
    batch, _, rows, keys = inputs.shape
    heads = max(residual.shape[1], order.shape[1], sizes.shape[1])
    left = expand_heads(residual.sum(-1), heads)
    skipped = torch.zeros_like(left) if skip is None else torch.minimum(expand_heads(skip, heads), left)
    pool = left - skipped
    drawn = torch.minimum(expand_heads(sizes, heads).expand_as(pool), pool)
    widest = int((drawn + skipped).max()) if drawn.numel() else 0
    # So many keys of the order hold `widest` residual ones, even if all others come first.
    reach = min(keys, widest + keys - int(left.min())) if drawn.numel() else 0
    order = order[..., :reach]
    if residual.shape[1] == 1:
        residual = residual.expand(-1, order.shape[1], -1, -1)
    order = expand_heads(order, residual.shape[1])
    eligible = residual.gather(-1, order)
    place = eligible.cumsum(-1, dtype=torch.int32) - 1
    slots = torch.where(eligible & (place < widest), place, widest).long()
    packed = torch.full((batch, order.shape[1], rows, widest + 1), -1, dtype=torch.int64, device=inputs.device)
    indices = expand_heads(packed.scatter_(-1, slots, order)[..., :widest], heads)
    slot = torch.arange(widest, device=inputs.device)
    outside = (slot < skipped.unsqueeze(-1)) | (slot >= (drawn + skipped).unsqueeze(-1))
    probability = (drawn / pool.clamp(min=1)).float().unsqueeze(-1).expand(indices.shape)
    return Mask.from_indices(indices.masked_fill(outside, -1), inputs.shape, probability, inputs.kv_heads)
