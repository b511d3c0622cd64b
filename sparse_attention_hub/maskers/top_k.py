"""Choosing the highest-scored keys of every row: what all top-k maskers share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..mask import Mask, expand_heads
from .inputs import NEVER, AttentionInputs, count_true


def choose_top(scores: Tensor, residual: Tensor, sizes: list[int], inputs: AttentionInputs) -> Mask:
    """The `sizes[b]` highest-scored residual keys of every row, as a mask.

    scores: float (B, h, Q, N); residual: bool (B, 1, kv heads or h, Q, N); rows with fewer residual keys take all of them.
    """
    if max(sizes, default=0) == 0:  # nothing is allowed
        return Mask.empty(inputs.shape, inputs.device, inputs.kv_heads)
    on_cpu = not scores.is_cuda and scores.dtype in (torch.float32, torch.float64)
    if inputs.shape[2] > 1 and len(set(sizes)) == 1 and on_cpu:
        return _choose_above(scores, residual, sizes[0], inputs)
    residual = expand_heads(residual, scores.shape[1]) if residual.shape[1] > 1 else residual
    eligible = scores if inputs.all_allowed and residual is inputs.allowed else scores.masked_fill(~residual, NEVER)
    return Mask.from_indices(top_indices(eligible, sizes), inputs.shape, kv_heads=inputs.kv_heads)


def _choose_above(scores: Tensor, residual: Tensor, size: int, inputs: AttentionInputs) -> Mask:
    """`choose_top` for many rows as one comparison: a key is chosen if its score reaches its row's threshold. In NumPy, whose
    sorting, comparing and masking are several times faster than torch's on a CPU."""
    residual = expand_heads(residual, scores.shape[1]) if residual.shape[1] > 1 else residual
    if inputs.viewers > 2 and scores is inputs.scores() and residual.shape[1] == 1:
        threshold = _threshold_of_shared(scores, inputs.allowed & ~residual, size, inputs)
    else:
        eligible = np.where(residual.numpy(), scores.numpy(), scores.numpy().dtype.type(NEVER))
        place = scores.shape[-1] - min(size, scores.shape[-1])
        eligible.partition(place, axis=-1)
        threshold = torch.from_numpy(eligible[..., place : place + 1])
    threshold = threshold.clamp(min=torch.finfo(scores.dtype).min)  # a score of -inf is never chosen
    chosen = np.greater_equal(scores.numpy(), threshold.numpy())
    chosen &= residual.numpy()
    counts = count_true(chosen)
    if counts.size and counts.max() > size:
        # Of keys that tie for the last places the most recent are taken, as everywhere: the oldest ones go.
        rows = counts > size
        held, limits = scores.numpy()[rows], threshold.numpy()[rows]
        tied = (held == limits) & chosen[rows]
        oldest = tied & (tied.cumsum(-1) <= (counts[rows] - size)[:, None])
        chosen[rows] &= ~oldest
        counts = np.minimum(counts, size)
    return Mask.from_dense(torch.from_numpy(chosen), inputs.shape[1], inputs.kv_heads, counts=torch.from_numpy(counts))


def _threshold_of_shared(scores: Tensor, taken: Tensor, size: int, inputs: AttentionInputs) -> Tensor:
    """The size-th highest score of the keys that are not taken, (B, H, Q, 1), from the sorted scores that all configurations
    of a replay share. taken: bool (B, 1, Q, N).

    Its place in the shared order is found by bisection, counting how many taken keys lie above a place: they stand in few
    columns, and nothing is sorted anew.
    """
    ranked = inputs.ranked(scores)
    columns = np.flatnonzero(taken.numpy().any((0, 1, 2)))
    ends = np.flatnonzero(np.diff(columns, append=-1) != 1)
    starts = np.concatenate([[0], ends[:-1] + 1]) if columns.size else ends[:0]
    parts: list[Any] = (
        [slice(columns[i], columns[j] + 1) for i, j in zip(starts, ends, strict=True)] if ends.size < 9 else [columns]
    )
    held = [np.add(scores.numpy()[..., part], _forbidding(taken.numpy()[..., part], scores)) for part in parts]
    # Places from the highest score down: with no taken key above it the threshold stands at size - 1, and each one that is
    # above moves it one further. `last` is always far enough, `first` is where it might already be.
    first = np.full((*scores.shape[:3], 1), min(size, scores.shape[-1]) - 1)
    last = np.minimum(first + count_true(taken.numpy())[..., None], scores.shape[-1] - 1)
    while True:
        middle = (first + last) // 2
        threshold = ranked.gather(-1, torch.from_numpy(scores.shape[-1] - 1 - middle))
        if (first == last).all():
            return threshold
        above = sum(count_true(np.greater_equal(part, threshold.numpy())) for part in held)
        enough = middle + 1 - np.asarray(above)[..., None] >= size
        first, last = np.where(enough, first, np.minimum(middle + 1, last)), np.where(enough, middle, last)


def _forbidding(wanted: np.ndarray, scores: Tensor) -> np.ndarray:
    """0 where a key is wanted, -inf elsewhere, in the type of the scores: adding it is the fastest way to mask them."""
    dtype = scores.numpy().dtype.type
    bias: np.ndarray = np.where(wanted, dtype(0.0), dtype(NEVER))
    return bias


def top_indices(scores: Tensor, sizes: list[int]) -> Tensor:
    """Where the `sizes[b]` highest scores of every row are: float (B, h, Q, N) to int64 (B, h, Q, max size).

    -1 = padding: for items of a smaller size, and where a row has fewer scores above -inf. Of keys that tie for the last
    places the most recent are taken, so that the choice depends neither on padding nor on the machine.
    """
    keys = scores.shape[-1]
    widths = [min(size, keys) for size in sizes]
    if len(set(widths)) == 1:
        return _top_of_rows(scores.reshape(-1, keys), widths[0]).view(*scores.shape[:-1], widths[0])
    out = torch.full((*scores.shape[:-1], max(widths)), -1, dtype=torch.int64, device=scores.device)
    for item, width in enumerate(widths):
        out[item, :, :, :width] = _top_of_rows(scores[item].reshape(-1, keys), width).view(*scores.shape[1:-1], width)
    return out


def _top_of_rows(scores: Tensor, width: int) -> Tensor:
    """`top_indices` for rows (R, N) of one size: int64 (R, width), in any order."""
    keys = scores.shape[-1]
    if width == 0:
        return torch.empty((scores.shape[0], 0), dtype=torch.int64, device=scores.device)
    if width == keys:
        indices = torch.arange(keys, device=scores.device).expand(scores.shape)
        return indices.masked_fill(scores == NEVER, -1)
    if not scores.is_cuda and scores.dtype in (torch.float32, torch.float64):
        # NumPy's vectorised partition takes half the time of topk on a CPU.
        numbers = scores.detach().numpy()
        threshold = np.partition(numbers, keys - width, axis=-1)[:, keys - width, None]
        places = np.flatnonzero(numbers >= threshold)
        if places.size == len(numbers) * width and threshold.min() > NEVER:
            # No ties for the last places, and no row with too few scores.
            return torch.from_numpy(places.reshape(-1, width) - np.arange(len(numbers))[:, None] * keys)
    best, indices = scores.topk(width, dim=-1, sorted=False)
    last = best.amin(-1, keepdim=True)
    last = last.masked_fill(last == NEVER, float("nan"))  # a row with too few scores has no boundary
    tied = best == last
    row, column = (scores == last).nonzero(as_tuple=True)
    if row.numel() > int(tied.sum()):
        ends = torch.bincount(row, minlength=scores.shape[0]).cumsum(0)
        newer = ends[row] - 1 - torch.arange(row.numel(), device=row.device)
        # Both sides go row by row, and a row has as many places for tied keys on the left as keys on the right.
        indices[tied] = column[newer < tied.sum(-1)[row]]
    return indices.masked_fill(best == NEVER, -1)
