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

#: Rows per masked block.
_ROWS = 512
#: Mask entries per block on a GPU, whose kernels may hold the block's scores: 128 MiB in float32.
_BLOCK_SCORES = 32 * 2**20
#: From this many rows on, two unmasked calls on a CPU are faster than a masked one: 1.2x.
_MANY_ROWS = 32


def dense_rows(queries: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None = None) -> Tensor:
    """Causal attention of queries (1, H, Q, D) at the last Q positions, keys and values (1, Hkv, N, D).

    window: keys that a query attends to, its own included. Returns (1, Q, H, D), the queries' dtype.
    """
    _, heads, length, width = queries.shape
    if window is not None and (keys.shape[2] <= window or length == 1):
        keys, values, window = keys[:, :, -window:], values[:, :, -window:], None
    kv_heads, total = keys.shape[1:3]
    grouped = queries[0].view(kv_heads, heads // kv_heads, length, width)
    if length == 1:  # one row sees every key: the heads of a group are the rows of one call
        own = grouped.view(1, kv_heads, heads // kv_heads, width)
        out = F.scaled_dot_product_attention(own, keys, values, scale=scaling).view(kv_heads, heads // kv_heads, 1, -1)
    elif window is None and (length == total or (queries.is_cuda and queries.dtype != torch.float32)):
        bias, gqa = causal_lower_right(length, total), heads != kv_heads
        out = F.scaled_dot_product_attention(queries, keys, values, bias, scale=scaling, enable_gqa=gqa)
    elif window is None and _can_join(queries, values):
        out = _joined(grouped, keys, values, scaling)
    else:
        out = _masked(grouped, keys, values, scaling, total if window is None else window)
    return out.reshape(1, heads, length, values.shape[3]).transpose(1, 2)


def _can_join(queries: Tensor, values: Tensor) -> bool:
    wide = queries.dtype in (torch.float32, torch.float64)  # narrower outputs would be rounded twice
    return queries.device.type == "cpu" and wide and queries.shape[2] >= _MANY_ROWS and queries.shape[3] == values.shape[3]


def _joined(grouped: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Unmasked attention to the prefix and causal attention to the queries' own keys, joined by
    their log-sum-exps. No mask is read, nothing above the diagonal computed. grouped: (Hkv, G, Q, D)."""
    group, length = grouped.shape[1:3]
    parts = []
    for place, causal in ((slice(0, keys.shape[2] - length), False), (slice(keys.shape[2] - length, None), True)):
        own = (t[0, :, None, place].expand(-1, group, -1, -1) for t in (keys, values))
        parts.append(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(grouped, *own, 0.0, causal, scale=scaling))
    (far, far_sum), (near, near_sum) = parts
    return torch.lerp(far, near, torch.sigmoid(near_sum - far_sum).unsqueeze(-1))


def _masked(grouped: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int) -> Tensor:
    """Attention in blocks of rows, each with a mask over the keys in reach. grouped: (Hkv, G, Q, D)."""
    kv_heads, group, length, _ = grouped.shape
    total = keys.shape[2]
    step = min(length, _ROWS)
    if grouped.is_cuda:
        step = max(1, min(step, _BLOCK_SCORES // (kv_heads * group * total)))
    out = grouped.new_empty((kv_heads, group, length, values.shape[3]))
    for start in range(0, length, step):
        stop = min(length, start + step)
        position = torch.arange(start, stop, device=keys.device)[:, None] + total - length
        first, end = max(0, start + total - length - window + 1), stop + total - length
        key = torch.arange(first, end, device=keys.device)
        allowed = (key <= position) & (key > position - window)
        own_keys, own_values = (t[0, :, None, first:end].expand(-1, group, -1, -1) for t in (keys, values))
        part = grouped[:, :, start:stop]
        out[:, :, start:stop] = F.scaled_dot_product_attention(part, own_keys, own_values, allowed, scale=scaling)
    return out
