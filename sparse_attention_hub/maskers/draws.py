"""Drawing keys without replacement, in the random order that all configurations of a call share."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from ..mask import Mask, expand_heads
from .inputs import AttentionInputs, count_true

# Standard deviations of a guess, to both sides, in which the bound of a draw is looked for.
_DEVIATIONS = 4


def draws_by_comparison(inputs: AttentionInputs, mask: Mask) -> bool:
    """Whether many rows draw: then a key is drawn if its place in the random order lies below its row's bound, and no lists
    are made. In NumPy, on a CPU."""
    return inputs.shape[2] > 1 and mask.is_certain and inputs.device.type == "cpu"


class OrderedResidual:
    """The residual keys of many rows in the call's random order. residual: bool (B, h, Q, N). On a CPU, comparisons in NumPy.

    left: residual keys of each row, int64 (B, h', Q), h' = max(h, kv heads).
    """

    def __init__(self, inputs: AttentionInputs, residual: Tensor) -> None:
        self.heads = max(residual.shape[1], inputs.kv_heads)
        self._inputs, self._residual = inputs, residual
        self._bits = np.packbits(residual.numpy(), axis=-1)
        self.left = expand_heads(_count_bits(self._bits), self.heads)

    def first(self, sizes: Tensor, without: Tensor | None = None) -> Tensor:
        """The first sizes (B, H or h', Q) residual keys of each row: bool (B, H or h', Q, N).

        without: bool (B, h, Q, N), keys to leave out, among them every allowed one that is not residual.

        A key is among them if its place in the order lies below its row's bound. Residual keys are spread evenly over a random
        order, so a bound is guessed, the keys below it counted, and what is missing read off near the guess: no sorting.
        """
        inputs, heads = self._inputs, sizes.shape[1]
        keys = inputs.shape[3]
        places = inputs.random_places()[:, :, None]
        grouped = (inputs.shape[0], inputs.kv_heads, heads // inputs.kv_heads, inputs.shape[2])
        bits = self._bits if self._bits.shape[1] == 1 else expand_heads(torch.from_numpy(self._bits), heads).numpy()
        wanted, left = sizes.unsqueeze(-1), expand_heads(self.left, heads).unsqueeze(-1).clamp(min=1)
        bounds = -(-wanted * keys // left)
        width = self._width(wanted, left)
        low, high = torch.zeros_like(bounds), torch.full_like(bounds, keys)

        def below(bounds: Tensor) -> np.ndarray:
            flags: np.ndarray = np.less(places, bounds.numpy().astype(places.dtype).reshape(*grouped, 1))
            return flags.reshape(*sizes.shape, keys)

        for turn in itertools.count():
            counts = _count_bits(np.packbits(below(bounds), axis=-1) & bits).unsqueeze(-1)
            if torch.equal(counts, wanted):
                break
            low, high = torch.where(counts < wanted, bounds, low), torch.where(counts > wanted, bounds, high)
            seen, inside = self._read_off(bounds, counts, wanted, width)
            if bool(inside.all()):
                bounds = seen
                break
            jump = bounds + torch.div((wanted - counts) * keys, left, rounding_mode="floor")
            halved = (jump <= low) | (jump >= high) | (turn % 2 == 1)
            bounds = torch.where(inside, seen, torch.where(halved, (low + high) // 2, jump))
        flags = below(bounds)
        if without is None:
            flags &= (expand_heads(self._residual, heads) if self._residual.shape[1] > 1 else self._residual).numpy()
            return torch.from_numpy(flags)
        np.greater(flags, expand_heads(without, heads).numpy(), out=flags)
        return inputs.only_allowed(torch.from_numpy(flags))

    def listed(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The same of a few as lists: (keys int64 (B, h', Q, K), which of them are meant: bool (B, h', Q, K)).

        sizes: int64 (B, h', Q). The start of the order is read until it holds every row's draw.
        """
        keys = self._inputs.shape[3]
        wanted, left = sizes.unsqueeze(-1), self.left.unsqueeze(-1).clamp(min=1)
        width = int(-(-wanted * keys // left).max()) + self._width(wanted, left) // 2
        while True:
            width = min(width, keys)
            indices = expand_heads(self._inputs.random_order()[..., :width], self.heads)
            residual = self._residual_at(indices)
            running = residual.numpy().cumsum(-1, dtype=np.int32)
            if width == keys or not (running[..., -1:] < wanted.numpy()).any():
                return indices, residual.logical_and_(torch.from_numpy(running <= wanted.numpy()))
            width *= 2

    def _window(self, start: Tensor, width: int) -> Tensor:
        """Which of `width` keys of the order from `start` (B, h, Q, 1) on are residual: bool (B, h, Q, width)."""
        heads, rows = start.shape[1], start.shape[2]
        order = self._inputs.random_order()
        places = (start + torch.arange(width)).view(start.shape[0], order.shape[1], heads // order.shape[1], rows, width)
        keys = order.unsqueeze(2).expand(*places.shape[:3], rows, -1).gather(-1, places).flatten(1, 2)
        return self._residual_at(keys)

    def _residual_at(self, keys: Tensor) -> Tensor:
        """Which of some keys (B, h, Q, K), h = h' or H, are residual: bool of the same shape."""
        return expand_heads(self._residual, keys.shape[1]).gather(-1, keys)

    def _width(self, wanted: Tensor, left: Tensor) -> int:
        """Places in which almost every row's bound is found: of the keys below a guess, the residual ones are as many as in
        a draw without replacement, so the guess strays by their standard deviation."""
        total = self._inputs.shape[3]
        size, residual = wanted.numpy().astype(np.float64), left.numpy() / total
        deviation = float(np.max(size * (1 - residual) * np.maximum(1 - size / (residual * total), 0) / residual**2)) ** 0.5
        return min(total, 2 * int(_DEVIATIONS * deviation) + 16)

    def _read_off(self, bounds: Tensor, counts: Tensor, wanted: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """(bounds below which `wanted` residual keys lie, where they are among `width` places around). All (B, h, Q, 1)."""
        total = self._inputs.shape[3]
        start = (bounds - width // 2).clamp(min=0, max=total - width)
        running = torch.from_numpy(self._window(start, width).numpy().cumsum(-1, dtype=np.int32))
        before = running.gather(-1, (bounds - start - 1).clamp(min=0)).masked_fill_(bounds == start, 0)
        lacking = wanted - (counts - before)
        inside = (lacking >= 0) & (lacking <= running[..., -1:])
        passed = count_true(np.less(running.numpy(), lacking.numpy().astype(np.int32)))
        return start + torch.from_numpy(passed).unsqueeze(-1) + (lacking > 0), inside


def _count_bits(packed: np.ndarray) -> Tensor:
    """How many bits of the last axis are set: int64."""
    narrow = np.uint16 if packed.shape[-1] < 2**13 else np.uint32  # sums several times as fast
    return torch.from_numpy(np.bitwise_count(packed).sum(-1, dtype=narrow).astype(np.int64))


def draw_without_replacement(inputs: AttentionInputs, residual: Tensor, sizes: Tensor, skip: Tensor | None = None) -> Mask:
    """The first `sizes` residual keys in the call's random order, after the first `skip` of them.

    residual: bool (B, h, Q, N); sizes and skip: int64 broadcastable to (B, h, Q). Each key's p = size / keys to draw from.
    """
    heads = max(residual.shape[1], inputs.kv_heads, sizes.shape[1])
    left = expand_heads(residual.sum(-1), heads)
    skipped = None if skip is None else torch.minimum(expand_heads(skip, heads), left)
    pool = left if skipped is None else left - skipped
    drawn = torch.minimum(expand_heads(sizes, heads), pool)
    ends = drawn if skipped is None else drawn + skipped
    shortest, longest = (int(end) for end in ends.aminmax())
    indices = expand_heads(_first_of_order(inputs, residual, longest, int(left.min())), heads)
    slot = torch.arange(longest, device=inputs.device)
    if shortest < longest:
        indices = indices.masked_fill(slot >= ends.unsqueeze(-1), -1)
    if skipped is not None:
        indices = indices.masked_fill(slot < skipped.unsqueeze(-1), -1)
    probability = (drawn / pool.clamp(min=1)).float().unsqueeze(-1).expand(indices.shape)
    return Mask(inputs.shape, indices=indices, probability=probability, kv_heads=inputs.kv_heads, counts=drawn)


def _first_of_order(inputs: AttentionInputs, residual: Tensor, count: int, least: int) -> Tensor:
    """The first `count` residual keys of every row in the random order: int64 (B, h', Q, count), -1 where a row has fewer.

    residual: bool (B, h, Q, N), h' = max(h, kv heads). least: how many the row with the fewest has.
    """
    batch, _, rows, keys = inputs.shape
    # So many keys of the order hold `count` residual ones, even if all others come first.
    order = inputs.random_order()[..., : min(keys, count + keys - least)]
    residual = residual.expand(-1, order.shape[1], -1, -1) if residual.shape[1] == 1 else residual
    order = expand_heads(order, residual.shape[1])
    eligible = residual.gather(-1, order)
    place = eligible.cumsum(-1, dtype=torch.int32)
    eligible &= place <= count
    if least >= count:  # then every row has exactly so many
        found = order[eligible] if order.is_cuda else torch.from_numpy(order.numpy()[eligible.numpy()])  # five times as fast
        return found.view(*order.shape[:3], count)
    packed = torch.full((batch, order.shape[1], rows, count + 1), -1, dtype=torch.int64, device=inputs.device)
    return packed.scatter_(-1, place.masked_fill(~eligible, 0).long(), order)[..., 1:]
