"""Attention over a mask from a call's exponentials, which the oracles, the error and all configurations of a replay share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .mask import Mask, expand_heads
from .maskers.inputs import LEAST_SHARED_MASS, NEVER, AttentionInputs, group_scores

# Up to this share of the keys, a CPU reads chosen ones one by one sooner than it multiplies all of them.
LISTED_SHARE = 0.25


def attend_shared(mask: Mask, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Attention over the mask: (output (B, Q, H, D), log-sum-exp (B, H, Q)), float32 or wider.

    For calls of several rows, whose mask soon names most of the keys. A row without keys gives 0 and -inf.
    """
    if inputs.needs_grad:
        return _by_logits(mask, inputs)
    values = inputs.usable_values.to(inputs.exponentials().dtype)
    way = _on_gpu if values.device.type != "cpu" else _by_lists if _is_sparse(mask, inputs) else _on_cpu
    sums, totals = way(mask, inputs, values)
    if float(totals.min()) < LEAST_SHARED_MASS:
        return _by_logits(mask, inputs)
    return (sums / totals.unsqueeze(-1)).transpose(1, 2), totals.log() + inputs.highest()


def _by_logits(mask: Mask, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """The same with a maximum over the chosen keys alone: nothing underflows, and gradients flow."""
    batch, heads, rows, keys = inputs.shape
    logits = inputs.biased(group_scores(inputs.queries, inputs.keys, inputs.scaling))
    probability = expand_heads(mask.held_probability(), heads).to(logits.dtype)
    logits = (logits - probability.clamp(min=1e-30).log()).masked_fill(probability == 0, NEVER)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == NEVER, 0.0).unsqueeze(-1)).exp()
    grouped = weights.view(batch, inputs.kv_heads, -1, keys) @ inputs.usable_values.to(weights.dtype)
    return grouped.view(batch, heads, rows, -1).transpose(1, 2), lse


def _on_gpu(mask: Mask, inputs: AttentionInputs, values: Tensor) -> tuple[Tensor, Tensor]:
    """(weighted sums of values (B, H, Q, D), sums of weights (B, H, Q))."""
    batch, heads, rows, keys = inputs.shape
    probability = mask.held_probability().unsqueeze(2)
    weights = inputs.exponentials().view(batch, probability.shape[1], -1, rows, keys)
    weights = (weights / probability.clamp(min=1e-30) * (probability > 0)).view(batch, heads, rows, keys)
    output = weights.view(batch, inputs.kv_heads, -1, keys) @ values
    return output.view(batch, heads, rows, -1), weights.sum(-1)


def _is_sparse(mask: Mask, inputs: AttentionInputs) -> bool:
    """Whether lists of the chosen keys are worth making, and no row's list is empty."""
    counts = mask.counts()
    return int(counts.min()) > 0 and float(counts.float().mean()) < LISTED_SHARE * inputs.shape[3]


def _by_lists(mask: Mask, inputs: AttentionInputs, values: Tensor) -> tuple[Tensor, Tensor]:
    """The same, reading only what was chosen, on a CPU: a bag of weighted values for each row."""
    batch, heads, rows, keys = inputs.shape
    flags = expand_heads(mask.chosen(), heads).numpy()
    counts = expand_heads(mask.counts(), heads).flatten().numpy()
    places = np.flatnonzero(flags)
    weights = inputs.exponentials().numpy().reshape(-1).take(places)
    if mask.draw is not None:
        _, drawn, rate = mask.draw
        inverse = np.repeat((1 / expand_heads(rate, heads).clamp(min=1e-30)).flatten().numpy(), counts)
        # The inverse rate where drawn, 1 elsewhere, without a branch a key: they lie mixed, and a branch is guessed wrong.
        inverse *= expand_heads(drawn, heads).numpy().reshape(-1).take(places).astype(inverse.dtype)
        weights *= np.maximum(inverse, 1, out=inverse)
    elif not mask.is_certain:
        weights /= expand_heads(mask.held_probability(), heads).numpy().reshape(-1).take(places)
    ends = counts.cumsum()
    starts = ends - counts
    # From places in (B, H, Q, N) to rows of the values as one table (B * Hkv * N, D).
    order = np.arange(counts.size)
    places -= np.repeat((order - order // (rows * inputs.group_size)) * keys, counts)
    table = values.reshape(-1, values.shape[-1])
    bags, offsets, own = torch.from_numpy(places), torch.from_numpy(starts), torch.from_numpy(weights)
    sums = F.embedding_bag(bags, table, offsets, mode="sum", per_sample_weights=own)
    totals = torch.from_numpy(np.add.reduceat(weights, starts))
    return sums.view(batch, heads, rows, -1), totals.view(batch, heads, rows)


def _on_cpu(mask: Mask, inputs: AttentionInputs, values: Tensor) -> tuple[Tensor, Tensor]:
    """The same, some rows of a head at a time. NumPy multiplies by booleans at the speed of memory, which torch does not."""
    if mask.is_certain:
        chosen = mask.chosen()

        def weigh(numbers: np.ndarray, out: np.ndarray, at: Callable[[Tensor], np.ndarray]) -> None:
            _keep(numbers, at(chosen), out)

    elif mask.draw is not None:
        sure, drawn, rate = mask.draw
        inverse = 1 / rate.clamp(min=1e-30)
        # As unsigned bytes sure - drawn is 1 where sure, 255 where drawn: what exceeds the inverse is cut down to it.
        cut = float(inverse.max()) <= 255

        def weigh(numbers: np.ndarray, out: np.ndarray, at: Callable[[Tensor], np.ndarray]) -> None:
            certain, lucky = at(sure), at(drawn)
            if cut:
                np.copyto(out, np.subtract(certain.view(np.uint8), lucky.view(np.uint8)))
                np.minimum(out, at(inverse), out=out)
            else:
                np.copyto(out, lucky)  # as in `_keep`: no product of two types
                np.multiply(out, at(inverse), out=out)
                np.add(out, certain, out=out)
            np.multiply(out, numbers, out=out)

    else:
        probability = mask.held_probability()
        probability = probability.masked_fill(probability == 0, float("inf"))

        def weigh(numbers: np.ndarray, out: np.ndarray, at: Callable[[Tensor], np.ndarray]) -> None:
            np.divide(numbers, at(probability), out=out)

    batch, heads, rows, _ = inputs.shape
    sums = torch.empty((batch, heads, rows, values.shape[-1]), dtype=values.dtype)
    totals = torch.empty((batch, heads, rows), dtype=values.dtype)
    for place, weights in inputs.weight_blocks(weigh):
        totals[place] = weights.sum(-1)
        own = values[place[0], place[1].start // inputs.group_size]
        sums[place] = (weights.flatten(0, 1) @ own).view(*weights.shape[:2], -1)
    return sums, totals


def _keep(numbers: np.ndarray, flags: np.ndarray, out: np.ndarray) -> None:
    """Fill out with the numbers where flagged, 0 elsewhere. To copy the flags first takes less than NumPy's mixed product."""
    np.copyto(out, flags)
    np.multiply(out, numbers, out=out)
