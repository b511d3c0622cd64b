"""Attention in plain torch, for any device, any dtype and gradients: of one row the listed keys, of several all keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..lists import expand_heads
from ..mask import Mask
from .reference import Known, attend_reference, group_scores, weigh


def attend_torch(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Mask,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    known: Known | None = None,
) -> tuple[Tensor, Tensor]:
    """(output (B, Q, H, D), log-sum-exp (B, H, Q)), both float32 or wider; see kernels.attend."""
    if queries.shape[2] > 1 or (known is not None and known.scores is not None):
        return attend_reference(queries, keys, values, mask, scaling, softcap, sinks, known)
    lists, heads = mask.lists(), mask.shape[1]
    units = mask.kv_heads if lists.heads in (1, mask.kv_heads) else heads
    indices = expand_heads(lists.indices, units)[:, :, 0]  # (B, units, K)
    padded = indices < 0
    places = indices.clamp(min=0).long().unsqueeze(-1)
    own_keys, own_values = (
        expand_heads(t, units).gather(2, places.expand(-1, -1, -1, t.shape[-1])).masked_fill(padded.unsqueeze(-1), 0.0)
        for t in (keys, values)
    )
    probability = (~padded).float() if lists.probability is None else expand_heads(lists.probability, units)[:, :, 0]
    probability = probability.masked_fill(padded, 0.0)
    logits = group_scores(queries, own_keys, scaling, softcap)
    return weigh(logits, expand_heads(probability.unsqueeze(2), heads), own_values, sinks)


def dot_torch(queries: Tensor, keys: Tensor, mask: Mask, scaling: float, softcap: float | None = None) -> Tensor:
    """Logits of the mask's keys, in the order of its lists: float32 or wider (B, H, Q, K), -inf on padding."""
    indices = expand_heads(mask.lists().indices, mask.shape[1])
    scores = group_scores(queries, keys, scaling, softcap).gather(-1, indices.clamp(min=0).long())
    return scores.masked_fill(indices < 0, float("-inf"))


def needs_grad(*tensors: Tensor) -> bool:
    """Whether the output must carry gradients, which compiled kernels cannot."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
