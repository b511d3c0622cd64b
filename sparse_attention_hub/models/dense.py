"""Dense attention on a filled cache, causal at the lower right, without copies of the cache.

torch's `is_causal` aligns at the upper left: wrong for a question after a prefix. Its masked path
repeats keys and values for every query head of a group: slow. Here the kv heads are the batch, so
that torch's fused kernels read each head's keys and values in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from ..kernels.reference import NEVER, group_scores, weigh
from .rules import PLAIN, Rule

#: Rows per masked block.
_ROWS = 512
#: Mask entries per block on a GPU, whose kernels may hold the block's scores, and scores that are computed at once: 128 MiB.
_BLOCK_SCORES = 32 * 2**20
#: From this many rows on, two unmasked calls on a CPU are faster than a masked one: 1.2x.
_MANY_ROWS = 32


def dense_rows(queries: Tensor, keys: Tensor, values: Tensor, scaling: float, rule: Rule = PLAIN) -> Tensor:
    """Causal attention of queries (1, H, Q, D) at the last Q positions, keys (1, Hkv, N, D) and values (1, Hkv, N, DV).

    Returns (1, Q, H, DV), the queries' dtype.
    """
    _, heads, length, width = queries.shape
    if rule.limited:
        last = keys.shape[2] - 1
        first, of_last = max(0, rule.first_key(last - length + 1)), max(0, rule.first_key(last))
        keys, values = keys[:, :, first:], values[:, :, first:]
        if first == of_last:  # all rows see the same keys, up to their own
            rule = rule._replace(window=None, chunk=None)
    if rule.scores:
        return _explicit(queries, keys, values, scaling, rule)
    kv_heads, total = keys.shape[1:3]
    grouped = queries[0].reshape(kv_heads, heads // kv_heads, length, width)
    if length == 1:  # one row sees every key: the heads of a group are the rows of one call
        own = grouped.view(1, kv_heads, heads // kv_heads, width)
        out = F.scaled_dot_product_attention(own, keys, values, scale=scaling).view(kv_heads, heads // kv_heads, 1, -1)
    elif not rule.limited and (length == total or (queries.is_cuda and queries.dtype != torch.float32)):
        bias, gqa = causal_lower_right(length, total), heads != kv_heads
        out = F.scaled_dot_product_attention(queries, keys, values, bias, scale=scaling, enable_gqa=gqa)
    elif not rule.limited and _can_join(queries, values):
        out = _joined(grouped, keys, values, scaling)
    else:
        out = _masked(grouped, keys, values, scaling, rule)
    return out.reshape(1, heads, length, values.shape[3]).transpose(1, 2)


def _can_join(queries: Tensor, values: Tensor) -> bool:
    wide = queries.dtype in (torch.float32, torch.float64)  # narrower outputs would be rounded twice
    return queries.device.type == "cpu" and wide and queries.shape[2] >= _MANY_ROWS and queries.shape[3] == values.shape[3]


def _joined(grouped: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Unmasked attention to the prefix and causal attention to the queries' own keys, joined by
    their log-sum-exps. No mask is read, nothing above the diagonal computed. grouped: (Hkv, G, Q, D)."""
    kv_heads, group, length, width = grouped.shape
    flash, prefix = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, keys.shape[2] - length
    rows = grouped.reshape(kv_heads, 1, group * length, width)  # a group's heads see the same prefix: they are rows of one call
    far, far_sum = flash(rows, *(t[0, :, None, :prefix] for t in (keys, values)), 0.0, False, scale=scaling)
    own = (t[0, :, None, prefix:].expand(-1, group, -1, -1) for t in (keys, values))
    near, near_sum = flash(grouped, *own, 0.0, True, scale=scaling)
    share = torch.sigmoid(near_sum - far_sum.view(near_sum.shape))
    return torch.lerp(far.view(near.shape), near, share.unsqueeze(-1))


def _masked(grouped: Tensor, keys: Tensor, values: Tensor, scaling: float, rule: Rule) -> Tensor:
    """Attention in blocks of rows, each with a mask over the keys in reach. grouped: (Hkv, G, Q, D)."""
    kv_heads, group, length, _ = grouped.shape
    total = keys.shape[2]
    step = min(length, _ROWS)
    if grouped.is_cuda:
        step = max(1, min(step, _BLOCK_SCORES // (kv_heads * group * total)))
    out = grouped.new_empty((kv_heads, group, length, values.shape[3]))
    for start in range(0, length, step):
        stop = min(length, start + step)
        reach, allowed = _reach(start + total - length, stop + total - length, rule, keys.device)
        own_keys, own_values = (t[0, :, None, reach].expand(-1, group, -1, -1) for t in (keys, values))
        part = grouped[:, :, start:stop]
        out[:, :, start:stop] = F.scaled_dot_product_attention(part, own_keys, own_values, allowed, scale=scaling)
    return out


def _explicit(queries: Tensor, keys: Tensor, values: Tensor, scaling: float, rule: Rule) -> Tensor:
    """Attention with softcap or sinks, which fused kernels lack, in blocks of rows: scores in float32 or wider.

    Queries (1, H, Q, D); returns (1, Q, H, DV).
    """
    _, heads, length, _ = queries.shape
    total, wide = keys.shape[2], torch.promote_types(queries.dtype, torch.float32)
    keys, values = keys.to(wide), values.to(wide)
    step = max(1, min(length, _ROWS, _BLOCK_SCORES // (heads * total)))
    out = queries.new_empty((1, length, heads, values.shape[3]))
    for start in range(0, length, step):
        stop = min(length, start + step)
        reach, allowed = _reach(start + total - length, stop + total - length, rule, keys.device)
        scores = group_scores(queries[:, :, start:stop], keys[:, :, reach], scaling, rule.softcap)
        out[:, start:stop] = weigh(scores.masked_fill_(~allowed, NEVER), None, values[:, :, reach], rule.sinks)[0]
    return out


def _reach(first_row: int, end_row: int, rule: Rule, device: torch.device) -> tuple[slice, Tensor]:
    """The keys that rows at these positions see, and which of them each row sees: bool (rows, keys)."""
    position = torch.arange(first_row, end_row, device=device)[:, None]
    first = max(0, rule.first_key(first_row))
    key = torch.arange(first, end_row, device=device)
    return slice(first, end_row), (key <= position) & (key >= rule.first_key(position))


def dense_with_mask(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float | None, rule: Rule) -> Tensor:
    """Attention under a mask (B, 1, Q, N), bool or added to the scores, with softcap and sinks. queries (B, H, Q, D), keys and
    values (B, Hkv, N, D or DV); returns (B, Q, H, DV), the queries' dtype."""
    batch, heads, length, width = queries.shape
    scale = width**-0.5 if scaling is None else scaling
    step = max(1, min(length, _ROWS, _BLOCK_SCORES // (batch * heads * keys.shape[2])))
    parts = []
    for start in range(0, length, step):
        scores = group_scores(queries[:, :, start : start + step], keys, scale, rule.softcap)
        own = mask[:, :, start : start + step]
        scores = scores.masked_fill_(~own, NEVER) if own.dtype == torch.bool else scores + own
        parts.append(weigh(scores, None, values, rule.sinks)[0].to(queries.dtype))
    return torch.cat(parts, 1)
