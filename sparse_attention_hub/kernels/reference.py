"""The reference: masked attention over all keys in float32 or wider. Simple, slow, and what the others are tested against."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..mask import Mask

NEVER = float("-inf")


class Known(NamedTuple):
    """What a caller knows of a call's scores already. scores (B, H, Q, N): logits with softcap and bias. terms (B, H, Q, N): exp(scores - highest), highest (B, H, Q): the
    highest score of each row, 0 where it is -inf; both or neither. biased: the scores hold a bias, so queries and keys alone do
    not tell them."""

    scores: Tensor | None = None
    terms: Tensor | None = None
    highest: Tensor | None = None
    biased: bool = False


def attend_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Mask,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    known: Known | None = None,
) -> tuple[Tensor, Tensor]:
    """(output (B, Q, H, D), log-sum-exp (B, H, Q)), both float32 or wider; see kernels.attend. Gradients flow. Values must be
    finite also where nothing attends to them."""
    logits = known.scores if known is not None else None
    if logits is None:
        logits = group_scores(queries, keys, scaling, softcap)
    return weigh(logits, mask.inclusion_probability(), values, sinks)


def weigh(logits: Tensor, probability: Tensor | None, values: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over logits (B, H, Q, N), each term divided by its probability (B, H, Q, N), of values (B, Hkv, N, D).

    probability None: all are certain; keys that are not attended to have a logit of -inf."""
    batch, heads, rows, keys = logits.shape
    if probability is not None:
        logits = logits - probability.clamp(min=1e-30).log().to(logits.dtype)
        logits = logits.masked_fill(probability == 0, NEVER)
    lse = logits.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1))
    weights = (logits - lse.masked_fill(lse == NEVER, 0.0).unsqueeze(-1)).exp()
    kv_heads = values.shape[1]
    grouped = weights.view(batch, kv_heads, heads // kv_heads * rows, keys) @ values.to(weights.dtype)
    return grouped.view(batch, heads, rows, values.shape[3]).transpose(1, 2), lse


def group_scores(queries: Tensor, keys: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """scaling * q.k for all pairs, without repeating keys over the heads of a group: float32 or wider (B, H, Q, N)."""
    batch, heads, rows, dim = queries.shape
    wide = torch.promote_types(queries.dtype, torch.float32)
    kv_heads = keys.shape[1]
    grouped = (queries.to(wide) * scaling).reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    scores = (grouped @ keys.to(wide).transpose(-1, -2)).view(batch, heads, rows, keys.shape[2])
    return scores if not softcap else softcap * torch.tanh(scores / softcap)
