"""Random sampling: some of what is left, all alike. The unbiased baseline of every sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..mask import Mask, expand_heads
from ..search_space import LogUniform
from .base import Masker, MaskerConfig, check_number, register_masker
from .inputs import AttentionInputs, count_true


@dataclass
class RandomSamplingMaskerConfig(MaskerConfig):
    """sampling_rate: keys to draw as a fraction of N, in (0, 1]."""

    sampling_rate: float

    def __post_init__(self) -> None:
        self.sampling_rate = check_number("sampling_rate", self.sampling_rate, 0.0, 1.0, open_low=True)

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return {"sampling_rate": LogUniform(0.005, 0.5)}


@register_masker(RandomSamplingMaskerConfig)
class RandomSamplingMasker(Masker[RandomSamplingMaskerConfig]):
    """Draws m = min(R, max(1, floor(rate * N))) of the R residual keys of a row without replacement: p = m / R.

    The estimate of the softmax denominator over the residual is unbiased, and exact at m = R. The query heads of a group
    share the order of keys they draw in.
    """

    is_sampling = True
    keeps_to_allowed = True

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        residual = mask.residual(inputs.allowed)
        sizes = torch.tensor(inputs.resolve(self.config.sampling_rate), device=inputs.device).view(-1, 1, 1)
        if not draws_by_comparison(inputs, mask):
            return mask.union(draw_without_replacement(inputs, residual, sizes))
        order = OrderedResidual(inputs, residual)
        sizes = torch.minimum(sizes, order.left)
        rate = (sizes / order.left.clamp(min=1)).float().unsqueeze(-1)
        counts = expand_heads(mask.counts(), order.heads) + sizes
        return Mask.from_draw(mask.chosen(), order.first(sizes), rate, inputs.shape[1], inputs.kv_heads, counts)


def draws_by_comparison(inputs: AttentionInputs, mask: Mask) -> bool:
    """Whether many rows draw: then a key is drawn if its place in the random order lies below its row's bound, and no lists
    are made. In NumPy, on a CPU."""
    return inputs.shape[2] > 1 and mask.is_certain and inputs.device.type == "cpu"


class OrderedResidual:
    """The residual keys of many rows in the call's random order. residual: bool (B, h, Q, N).

    left: residual keys of each row, int64 (B, h', Q), h' = max(h, kv heads).
    """

    def __init__(self, inputs: AttentionInputs, residual: Tensor) -> None:
        batch, held, rows, keys = residual.shape
        self._inputs, self._kv_heads = inputs, inputs.kv_heads
        self.heads = max(held, inputs.kv_heads)
        self.left = expand_heads(torch.from_numpy(count_true(residual.numpy())), self.heads)
        self._places = inputs.random_places()[:, :, None]
        self._residual = residual.numpy()[:, :, None] if held == 1 else self._grouped(residual)
        # Keys that are not residual get the highest bit, which no place has, and are last when sorted.
        highest = self._places.dtype.type(1 << (8 * self._places.itemsize - 1))
        ordered = np.multiply(~self._residual, highest)
        ordered = np.add(self._places, ordered).reshape(batch, self.heads, rows, keys)
        ordered.sort(axis=-1)
        self._ordered = torch.from_numpy(ordered.view(np.int16 if ordered.itemsize == 2 else np.int32))

    def keys(self, sizes: Tensor) -> Tensor:
        """The first sizes (B, h', Q) residual keys of each row: int64 (B, h', Q, max size), -1 = padding."""
        widest = int(sizes.max())
        places = self._ordered[..., :widest].long()
        outside = torch.arange(widest) >= sizes.unsqueeze(-1)
        places = places.masked_fill_(outside, 0)
        places = places.view(places.shape[0], self._kv_heads, -1, *places.shape[2:])
        order = self._inputs.random_order().unsqueeze(2).expand(-1, -1, places.shape[2], -1, -1)
        return order.gather(-1, places).flatten(1, 2).masked_fill_(outside, -1)

    def first(self, sizes: Tensor) -> Tensor:
        """The same as flags, for as many heads as there are sizes (B, H or h', Q): bool (B, H or h', Q, N)."""
        heads = sizes.shape[1]
        last = expand_heads(self._ordered, heads).gather(-1, (sizes - 1).clamp(min=0).unsqueeze(-1)).int()
        bounds = torch.where(sizes.unsqueeze(-1) > 0, last + 1, 0).numpy().astype(self._places.dtype)
        drawn = np.less(self._places, self._grouped(bounds))
        drawn &= self._residual
        return torch.from_numpy(drawn.reshape(*sizes.shape, -1))

    def _grouped(self, held: Tensor | np.ndarray) -> np.ndarray:
        """(B, h', Q, n) to (B, Hkv, h' / Hkv, Q, n)."""
        array = np.asarray(held)
        return array.reshape(array.shape[0], self._kv_heads, -1, *array.shape[2:])


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


if __name__ == "__main__":
    from sparse_attention_hub.maskers.drawing import main

    main("random_sampling")
