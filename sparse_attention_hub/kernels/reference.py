"""Attention in plain torch. `attend_reference` masks all keys: simple, slow, and what the others are tested against.
`attend_torch` is for any device and for gradients: of one row it reads the listed keys alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..lists import expand_heads
from ..mask import Mask

NEVER = float("-inf")


class Known(NamedTuple):
    """What a caller knows of a call's scores already. scores (B, H, Q, N): logits with softcap and bias.

    terms (B, H, Q, N): exp(scores - highest), highest (B, H, Q): the highest score of each row, 0 where it is -inf; both or
    neither. biased: the scores hold a bias, so queries and keys alone do not determine them.
    """

    scores: Tensor | None = None
    terms: Tensor | None = None
    highest: Tensor | None = None
    biased: bool = False


class Call(NamedTuple):
    """What a backend is given; `kernels.attend` explains the fields. values None: they are not needed."""

    queries: Tensor
    keys: Tensor
    values: Tensor | None
    mask: Mask
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    known: Known = Known()

    def scores(self) -> Tensor:
        """Logits of all keys, float32 or wider (B, H, Q, N)."""
        if self.known.scores is not None:
            return self.known.scores
        return group_scores(self.queries, self.keys, self.scaling, self.softcap)


def attend_reference(call: Call) -> tuple[Tensor, Tensor]:
    """(output (B, Q, H, D), log-sum-exp (B, H, Q)), both float32 or wider. Gradients flow. Values must be finite also where
    nothing attends to them."""
    assert call.values is not None
    return weigh(call.scores(), call.mask.inclusion_probability(), call.values, call.sinks)


def attend_torch(call: Call) -> tuple[Tensor, Tensor]:
    """(output (B, Q, H, D), log-sum-exp (B, H, Q)), both float32 or wider."""
    mask, values = call.mask, call.values
    assert values is not None
    if mask.shape[2] > 1 or call.known.scores is not None:
        return attend_reference(call)
    lists, heads = mask.lists(), mask.shape[1]
    padded, own_keys, own_values = _listed(mask, call.keys, values)
    units, given = own_keys.shape[1], lists.probability
    probability = (~padded).float() if given is None else expand_heads(given, units)[:, :, 0]
    probability = probability.masked_fill(padded, 0.0)
    logits = group_scores(call.queries, own_keys, call.scaling, call.softcap)
    return weigh(logits, expand_heads(probability.unsqueeze(2), heads), own_values, call.sinks)


def dot_torch(call: Call) -> Tensor:
    """Logits of the mask's keys, in the order of its lists: float32 or wider (B, H, Q, K), -inf on padding."""
    heads = call.mask.shape[1]
    if call.mask.shape[2] == 1 and call.known.scores is None:
        padded, own_keys = _listed(call.mask, call.keys)
        logits = group_scores(call.queries, own_keys, call.scaling, call.softcap)
        return logits.masked_fill(expand_heads(padded, heads).unsqueeze(2), NEVER)
    indices = expand_heads(call.mask.lists().indices, heads)
    return call.scores().gather(-1, indices.clamp(min=0).long()).masked_fill(indices < 0, NEVER)


def log_mass_torch(call: Call) -> Tensor:
    """The log-sum-exp of `attend_torch` alone, (B, H, Q)."""
    logits, probability = dot_torch(call), call.mask.lists().probability
    if probability is not None:
        logits = logits - expand_heads(probability, logits.shape[1]).clamp(min=1e-30).log()
    return logits.logsumexp(-1)


def _listed(mask: Mask, *tensors: Tensor) -> list[Tensor]:
    """Of a mask of one row: which entries of its lists are padding, bool (B, h, K), and the rows (B, h, K, D) of each tensor
    (B, Hkv, N, D) that they name, 0 on padding."""
    units = mask.kv_heads if mask.shared_heads in (1, mask.kv_heads) else mask.shape[1]
    indices = expand_heads(mask.lists().indices, units)[:, :, 0]
    padded, places = indices < 0, indices.clamp(min=0).long().unsqueeze(-1)
    rows = [expand_heads(t, units).gather(2, places.expand(-1, -1, -1, t.shape[-1])) for t in tensors]
    return [padded, *(own.masked_fill(padded.unsqueeze(-1), 0.0) for own in rows)]


def weigh(logits: Tensor, probability: Tensor | None, values: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over logits (B, H, Q, N), each term divided by its probability (B, H, Q, N), of values (B, Hkv, N, D).

    probability None: all are certain; keys that are not attended to have a logit of -inf."""
    if probability is not None:
        logits = logits - probability.clamp(min=1e-30).log().to(logits.dtype)
        logits = logits.masked_fill(probability == 0, NEVER)
    lse = logits.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1))
    weights = (logits - lse.masked_fill(lse == NEVER, 0.0).unsqueeze(-1)).exp()
    return group_sums(weights, values), lse


def group_sums(weights: Tensor, values: Tensor) -> Tensor:
    """Sums of values (B, Hkv, N, D) under weights (B, H, Q, N), without repeating them over the heads of a group: (B, Q, H, D)."""
    batch, heads, rows, keys = weights.shape
    kv_heads = values.shape[1]
    grouped = weights.view(batch, kv_heads, heads // kv_heads * rows, keys) @ values.to(weights.dtype)
    return grouped.view(batch, heads, rows, values.shape[3]).transpose(1, 2)


def group_scores(queries: Tensor, keys: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """scaling * q.k for all pairs, without repeating keys over the heads of a group: float32 or wider (B, H, Q, N)."""
    batch, heads, rows, dim = queries.shape
    wide = torch.promote_types(queries.dtype, torch.float32)
    kv_heads, total = keys.shape[1:3]
    shape = (batch, kv_heads, heads // kv_heads * rows, dim)
    if queries.is_cuda and queries.dtype == keys.dtype != wide and not needs_grad(queries, keys):
        # 16-bit products summed in float32, without a float32 copy of the keys.
        own, others = queries.reshape(shape).flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)
        scores = (torch.bmm(own, others, out_dtype=wide) * scaling).view(batch, heads, rows, total)
    else:
        grouped = (queries.to(wide) * scaling).reshape(shape)
        scores = (grouped @ keys.to(wide).transpose(-1, -2)).view(batch, heads, rows, total)
    return scores if not softcap else softcap * torch.tanh(scores / softcap)


def needs_grad(*tensors: Tensor) -> bool:
    """Whether the output must carry gradients, which compiled kernels cannot."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
