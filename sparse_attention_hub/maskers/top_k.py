"""Choosing the highest-scored keys of every row: what all top-k maskers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..mask import Mask, expand_heads
from .inputs import NEVER, AttentionInputs, count_true

# Residuals whose complements are remembered: of the configurations of a replay or two.
_REMEMBERED = 32


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
    numbers, keys = scores.numpy(), scores.shape[-1]
    if inputs.viewers > 2 and scores is inputs.scores() and residual.shape[1] == 1:
        return _choose_above_shared(scores, _taken(residual, inputs), size, inputs)
    eligible = np.where(residual.numpy(), numbers, numbers.dtype.type(NEVER))
    place = keys - min(size, keys)
    eligible.partition(place, axis=-1)
    threshold = _above_never(eligible[..., place : place + 1])
    chosen = np.greater_equal(numbers, threshold)
    chosen &= residual.numpy()
    return _highest_of(chosen, numbers, size, inputs)


def _choose_above_shared(scores: Tensor, taken: _Taken, size: int, inputs: AttentionInputs) -> Mask:
    """The same of the keys that are not taken, by means of the sorted scores that all configurations of a replay share."""
    numbers, keys = scores.numpy(), scores.shape[-1]
    ranked = inputs.ranked(scores).numpy().reshape(-1, keys)
    place = keys - 1 - _places_of_shared(numbers, ranked, taken, size)
    row = np.arange(len(ranked))
    reached = ranked[row, place]
    threshold = _above_never(reached.reshape(*scores.shape[:3], 1))
    chosen = np.greater_equal(numbers, threshold)
    for part, free in zip(taken.columns, taken.free, strict=True):
        chosen[..., part] &= free
    if size <= keys and place.min() > 0 and reached.min() > NEVER and (ranked[row, place - 1] < reached).all():
        # Every row has enough keys and its last place no rival: nothing is left to count.
        counts = torch.full(scores.shape[:3], size)
        return Mask.from_dense(torch.from_numpy(chosen), inputs.shape[1], inputs.kv_heads, counts=counts)
    return _highest_of(chosen, numbers, size, inputs)


@dataclass
class _Taken:
    """The keys that others took, which stand in few columns: some slices, or one array if they are scattered.

    In these columns: free, bool (B, 1, Q, n), where nothing was taken; barred, (B, 1, Q, n), 0 where something was, -inf
    elsewhere: to add it is the fastest way to mask scores. counts: taken keys of each row, int64 (B, 1, Q).
    """

    residual: Tensor
    columns: list[Any]
    free: list[np.ndarray]
    barred: list[np.ndarray]
    counts: np.ndarray


def _taken(residual: Tensor, inputs: AttentionInputs) -> _Taken:
    """What is not residual, bool (B, 1, Q, N). The first maskers of a configuration mostly go by positions: then its residual is
    one for all layers, and so is this."""
    known: dict[int, _Taken] = inputs.by_position("taken", dict)
    found = known.get(id(residual))
    if found is None:
        taken = torch.gt(inputs.allowed, residual).numpy()
        columns = _columns(taken)
        parts = [taken[..., part] for part in columns]
        barred = [np.where(part, np.float32(0.0), np.float32(NEVER)) for part in parts]
        found = _Taken(residual, columns, [~part for part in parts], barred, count_true(taken))
        if len(known) >= _REMEMBERED:
            known.clear()
        known[id(residual)] = found  # which keeps the residual alive, so that no other has its id
    return found


def _highest_of(chosen: np.ndarray, scores: np.ndarray, size: int, inputs: AttentionInputs) -> Mask:
    """The mask of the chosen keys, bool (B, H, Q, N), of a row with more than `size` the highest. Of keys that tie for the last
    places the most recent are taken, as everywhere: the oldest ones go."""
    counts = count_true(chosen)
    if counts.size and counts.max() > size:
        rows = counts > size
        held = np.where(chosen[rows], scores[rows], scores.dtype.type(NEVER))
        limits = np.partition(held, -size, axis=-1)[:, -size, None]
        above, tied = held > limits, held == limits
        excess = count_true(above) + count_true(tied) - size
        chosen[rows] = above | (tied & (tied.cumsum(-1) > excess[:, None]))
        counts = np.minimum(counts, size)
    return Mask.from_dense(torch.from_numpy(chosen), inputs.shape[1], inputs.kv_heads, counts=torch.from_numpy(counts))


def _above_never(threshold: np.ndarray) -> np.ndarray:
    """The threshold, raised so that a score of -inf is never chosen."""
    raised: np.ndarray = np.maximum(threshold, np.finfo(threshold.dtype).min)
    return raised


def _columns(taken: np.ndarray) -> list[Any]:
    """The columns in which some row has a taken key, as a few slices, or one array if they are scattered."""
    columns = np.flatnonzero(taken.any((0, 1, 2)))
    if not columns.size:
        return []
    ends = np.flatnonzero(np.diff(columns, append=-1) != 1)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if ends.size > 8:
        return [columns]
    return [slice(columns[i], columns[j] + 1) for i, j in zip(starts, ends, strict=True)]


def _places_of_shared(scores: np.ndarray, ranked: np.ndarray, taken: _Taken, size: int) -> np.ndarray:
    """Where each row's threshold stands, counted from its highest score down: int64 (B * H * Q,).

    With no taken key above it a threshold stands at size - 1, and each one that is above moves it one further: it is looked
    for where size - 1 + (taken keys at or above a place) is that place. As this sum grows with the place, one that exceeds its
    place is a lower bound, one that falls short an upper bound, and mostly itself the next best guess; every other guess
    halves what is between the bounds. Where taken keys tie, a place a little further down may pass for it: then more than
    `size` keys reach it, never fewer.
    """
    keys = scores.shape[-1]
    held = np.empty((*scores.shape[:3], sum(part.shape[-1] for part in taken.barred)), scores.dtype)
    end = 0
    for part, barred in zip(taken.columns, taken.barred, strict=True):
        start, end = end, end + barred.shape[-1]
        np.add(scores[..., part], barred, out=held[..., start:end])
    held = held.reshape(len(ranked), -1)
    nearest = min(size, keys) - 1
    low = np.full(len(ranked), nearest)
    high = np.minimum(low.reshape(scores.shape[:3]) + taken.counts, keys - 1).ravel()
    guess = (low + high) // 2
    places: np.ndarray = guess.copy()
    rows, halve = np.arange(len(ranked)), False
    while True:
        reached = ranked[rows, keys - 1 - guess]
        found = np.minimum(nearest + count_true(np.greater_equal(held, reached[:, None])), keys - 1)
        places[rows] = guess
        missed = np.flatnonzero(found != guess)
        if not missed.size:
            return places
        low, high = np.where(found > guess, found, low), np.where(found < guess, found, high)
        guess = np.where(found == guess, guess, (low + high) // 2) if halve else found
        halve = not halve
        if missed.size < 0.75 * len(rows):
            rows, held, low, high, guess = (part[missed] for part in (rows, held, low, high, guess))


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
