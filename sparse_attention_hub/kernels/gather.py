"""Gathered attention in plain torch: reads only the keys and values that the mask names. The path for CPUs.

Decoding (one row) gathers each head's own list; several rows gather the union over a kv head's rows once and tell the rows
apart by log weights, since their lists together soon cover more than the union does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mask import Mask, expand_heads

NEVER = float("-inf")


def attend_gather(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Mask, scaling: float, scores: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(output (B, Q, H, D), log-sum-exp (B, H, Q)), float32 or wider. A row without keys gives 0 and -inf. scores: see attend."""
    if queries.shape[2] == 1:
        return _attend_rows(queries, keys, values, mask, scaling, scores)
    return _attend_union(queries, keys, values, mask, scaling)


def attend_gather_output(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Mask, scaling: float, scores: Tensor | None = None
) -> Tensor:
    """The output of `attend_gather`, in half the time: without a log-sum-exp to compute, one fused call does it all. Only where
    every row has a key, and one row's lists have no padding; of several rows, keys and values must be finite everywhere."""
    if queries.shape[2] > 1:
        if queries.is_cuda or mask.shape[3] == 0 or int(mask.counts().min()) == 0:
            return attend_gather(queries, keys, values, mask, scaling, scores)[0]
        return _fused_union(queries, keys, values, mask, scaling)
    if not _is_full(mask):
        return attend_gather(queries, keys, values, mask, scaling, scores)[0]
    return _fused_rows(queries, keys, values, mask, scaling, scores)


def _fused_rows(queries: Tensor, keys: Tensor, values: Tensor, mask: Mask, scaling: float, scores: Tensor | None) -> Tensor:
    batch, heads, _, dim = queries.shape
    wide = torch.promote_types(queries.dtype, torch.float32)
    indices, log_weight = _lists(mask)
    lists = indices.shape[1]
    if scores is None and lists < heads:
        grouped = queries.to(wide).view(batch, lists, heads // lists, dim)
        chosen_keys, chosen_values = gather_rows(keys, indices).to(wide), gather_rows(values, indices).to(wide)
        added = None if log_weight is None else log_weight.to(wide)  # the fused kernel misreads a narrower mask
        output = F.scaled_dot_product_attention(grouped, chosen_keys, chosen_values, attn_mask=added, scale=scaling)
    else:
        logits = _logits(queries, keys, indices, scaling, scores)
        weights = torch.softmax(logits if log_weight is None else logits + log_weight, -1)
        output = _weigher(values, indices, heads, wide)(weights)
    return output.view(batch, 1, heads, -1)


def _fused_union(queries: Tensor, keys: Tensor, values: Tensor, mask: Mask, scaling: float) -> Tensor:
    batch, heads, rows, dim = queries.shape
    kv_heads = keys.shape[1]
    wide = torch.promote_types(queries.dtype, torch.float32)
    lists, keys, values = _union_of(mask, keys, values)
    bias = _take(_log_weights(mask), lists)
    bias = bias if bias.dtype == torch.bool else bias.to(wide)  # the fused kernel misreads a narrower mask
    if bias.shape[1] < heads:
        bias = expand_heads(bias, kv_heads).unsqueeze(2)
    # The kv heads are the batch: the fused kernel then reads each one's keys and values in place for its group.
    output = F.scaled_dot_product_attention(
        queries.to(wide).reshape(batch * kv_heads, heads // kv_heads, rows, dim),
        keys.to(wide).flatten(0, 1).unsqueeze(1).expand(-1, heads // kv_heads, -1, -1),
        values.to(wide).flatten(0, 1).unsqueeze(1).expand(-1, heads // kv_heads, -1, -1),
        attn_mask=bias.reshape(batch * kv_heads, -1, *bias.shape[-2:]),
        scale=scaling,
    )
    return output.view(batch, heads, rows, -1).transpose(1, 2)


def _log_weights(mask: Mask) -> Tensor:
    """What the mask adds to logits, as the mask is held (B, h, Q, N): -log p, -inf where not attended; or bool where all is
    certain."""
    if mask.is_certain:
        return mask.chosen()
    if mask.draw is not None:
        sure, drawn, rate = mask.draw
        added = torch.where(drawn, -rate.clamp(min=1e-30).log(), NEVER)
        return added.masked_fill_(expand_heads(sure, drawn.shape[1]), 0.0)
    held = mask.held_probability()
    return (-held.log()).masked_fill_(held == 0, NEVER)


def _attend_rows(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Mask, scaling: float, scores: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, heads = queries.shape[:2]
    indices, log_weight = _lists(mask)
    full = _is_full(mask)
    # Padding reads a key of its own row with weight 0: what stands elsewhere may be anything, NaN too.
    safe = (
        indices
        if full or indices.shape[-1] == 0
        else torch.where(indices < 0, indices.amax(-1, keepdim=True), indices).clamp(min=0)
    )
    logits = _logits(queries, keys, safe, scaling, scores)
    if log_weight is not None:
        logits = logits + log_weight
    if not full:
        logits = logits.masked_fill((indices < 0).unsqueeze(2), NEVER)
    output, lse = _softmax_times(logits, _weigher(values, safe, heads, logits.dtype))
    output = output.view(batch, 1, heads, -1)
    if not full:
        output = output.masked_fill(lse.view(batch, 1, heads, 1) == NEVER, 0.0)
    return output, lse.view(batch, heads, 1)


def _is_full(mask: Mask) -> bool:
    """Whether every list holds keys only, and some: known without a look at them, and most often true."""
    width = mask.rows()[0].shape[-1]
    return width > 0 and int(mask.counts().min()) == width


def _lists(mask: Mask) -> tuple[Tensor, Tensor | None]:
    """One row's keys (B, h, K) and what their inclusion probabilities add to logits, (B, h, 1, K) or None. h = kv heads where
    the heads of a group share their lists, which are then gathered once, else H."""
    indices, probability = mask.rows()
    heads = mask.kv_heads if indices.shape[1] in (1, mask.kv_heads) else mask.shape[1]
    log_weight = None if probability is None else -expand_heads(probability, heads).clamp(min=1e-30).log()
    return expand_heads(indices, heads)[:, :, 0], log_weight


def _logits(queries: Tensor, keys: Tensor, indices: Tensor, scaling: float, scores: Tensor | None) -> Tensor:
    """Of one row's query heads and the keys of their lists (B, h, K): (B, h, H / h, K), float32 or wider."""
    batch, heads, _, dim = queries.shape
    lists = indices.shape[1]
    if scores is not None:
        known = scores.reshape(batch, lists, heads // lists, -1)
        return known.gather(-1, indices.unsqueeze(2).expand(-1, -1, heads // lists, -1))
    wide = torch.promote_types(queries.dtype, torch.float32)
    grouped = (queries.to(wide) * scaling).view(batch, lists, heads // lists, dim)
    return grouped @ gather_rows(keys, indices).to(wide).transpose(-1, -2)


def _weigher(values: Tensor, indices: Tensor, heads: int, wide: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The function from weights (B, h, H / h, K) of listed keys (B, h, K) to their weighted sums of values."""
    if indices.shape[1] == heads and indices.shape[-1] and values.dtype == wide == torch.float32 and not values.is_cuda:
        # One row a list: summing the values as a weighted bag reads them in place, without the gathered copy.
        rows, places = _addressed(values, indices)
        width = indices.shape[-1]
        starts = torch.arange(0, places.numel(), width, device=values.device)
        # Called without F.embedding_bag's checks, which take as long as the sum itself.
        return lambda weights: torch.embedding_bag(rows, places.flatten(), starts, False, 0, False, weights.flatten())[0].view(
            *weights.shape[:3], -1
        )
    picked = gather_rows(values, indices).to(wide)
    return lambda weights: weights @ picked


def _attend_union(queries: Tensor, keys: Tensor, values: Tensor, mask: Mask, scaling: float) -> tuple[Tensor, Tensor]:
    batch, heads, rows, dim = queries.shape
    kv_heads = keys.shape[1]
    wide = torch.promote_types(queries.dtype, torch.float32)
    chosen = mask.chosen()
    lists, *picked = _union_of(mask, keys, values)
    grouped = (queries.to(wide) * scaling).reshape(batch, kv_heads, -1, dim)
    logits = grouped @ picked[0].to(wide).transpose(-1, -2)
    logits = logits.view(batch, kv_heads, heads // kv_heads, rows, logits.shape[-1])

    def by_group(held: Tensor) -> Tensor:
        """(B, h, Q, K), h as the mask is held, broadcastable to the logits (B, kv_heads, H/kv_heads, Q, K)."""
        shared = held.shape[1] in (1, kv_heads)
        return held.unsqueeze(2) if shared else held.reshape(batch, kv_heads, heads // kv_heads, *held.shape[2:])

    if not mask.is_certain:
        logits = logits - by_group(_take(mask.held_probability(), lists)).to(wide).clamp(min=1e-30).log()
    logits = logits.masked_fill(~by_group(_take(chosen, lists)), NEVER)
    wide_values = picked[1].to(wide)
    output, lse = _softmax_times(logits.flatten(2, 3), lambda w: w @ wide_values)
    return output.view(batch, heads, rows, -1).transpose(1, 2), lse.view(batch, heads, rows)


def _union_of(mask: Mask, keys: Tensor, values: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """(lists (B, K), keys and values at them): what any row or head attends to; (None, all of them) where that is most."""
    union = mask.chosen().flatten(1, 2).any(1)
    width = int(union.sum(-1).max())
    if 2 * width >= keys.shape[2]:
        return None, keys, values
    # One list for all kv heads of an item: over many rows their unions hardly differ, and one gather serves all.
    lists = (~union).to(torch.uint8).argsort(dim=-1, stable=True)[:, :width]
    per_head = lists[:, None].expand(-1, keys.shape[1], -1)
    return lists, gather_rows(keys, per_head), gather_rows(values, per_head)


def _softmax_times(logits: Tensor, weigh: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Softmax over the last dim of (..., R, K), its weights taken through `weigh` (weights to their sum of values), and the
    log-sum-exp; rows of -inf alone give 0 and -inf."""
    if logits.shape[-1] == 0:
        return weigh(logits), logits.new_full(logits.shape[:-1], NEVER)
    top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)  # finite in a row of -inf alone too
    weights = (logits - top).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (total.log() + top).squeeze(-1)
    share = total.clamp(min=1.0)  # the highest logit alone weighs 1; less only if there is none
    weights = weights / share if weights.requires_grad else weights.div_(share)
    return weigh(weights), lse


def gather_rows(tensor: Tensor, indices: Tensor) -> Tensor:
    """Rows of (B, h, N, D) by indices (B, H, K), H a multiple of h: (B, H, K, D). See `_addressed`."""
    rows, places = _addressed(tensor, indices)
    return rows.index_select(0, places.flatten()).view(*indices.shape, tensor.shape[-1])


def _addressed(tensor: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(B, h, N, D) as one table of rows (M, D), and the places (B, H, K) in it that indices (B, H, K) mean.

    One flat index_select is several times faster on a CPU than advanced indexing. A cache hands over the front part of a
    longer buffer, so rows are addressed in the buffer itself instead of copying it to be contiguous.
    """
    batch, held, total, dim = tensor.shape
    strides = tensor.stride()
    if strides[3] != 1 or strides[2] != dim or strides[0] % dim or strides[1] % dim:
        tensor = tensor.contiguous()
        strides = tensor.stride()
    offsets = _offsets(batch, indices.shape[1], held, strides[0] // dim, strides[1] // dim, tensor.device)
    last = (batch - 1) * (strides[0] // dim) + (held - 1) * (strides[1] // dim) + total
    return tensor.as_strided((last, dim), (dim, 1)), indices + offsets


@functools.lru_cache(maxsize=64)
def _offsets(batch: int, heads: int, held: int, per_item: int, per_head: int, device: torch.device) -> Tensor:
    """Where each head's rows begin in the table, (B, H, 1); the same for all steps and layers of an answer."""
    head_of = torch.arange(heads, device=device) // (heads // held)
    return (head_of * per_head + torch.arange(batch, device=device).unsqueeze(1) * per_item).unsqueeze(-1)


def _take(tensor: Tensor, lists: Tensor | None) -> Tensor:
    """Columns of (B, h, Q, N) by lists (B, K), or all of them."""
    if lists is None:
        return tensor
    return tensor.gather(-1, lists[:, None, None].expand(-1, tensor.shape[1], tensor.shape[2], -1))
