"""Dense attention on a filled cache, causal at the lower right, without copies of the cache for each query head.

torch's `is_causal` aligns at the upper left, and its masked path repeats keys and values for every query head of a
group: both are wrong or slow for a question on a long prefix. Here the kv heads are the batch, so that torch's fused kernels
read each one's keys and values in place for its group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

#: Rows a masked block.
_ROWS = 512
#: Mask entries of a block on a GPU, whose kernels may hold the scores of a masked block: 128 MiB in float32.
_BLOCK_SCORES = 32 * 2**20
#: From so many rows on, two calls on a CPU take less time than one with a mask: 1.2x.
_MANY_ROWS = 32


def dense_rows(queries: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None = None) -> Tensor:
    """Causal attention of queries (1, H, Q, D), the last Q positions, over keys and values (1, Hkv, N, D).

    window: each query attends to its last `window` keys, itself included. Returns (1, Q, H, D) in the queries' dtype.
    """
    _, heads, length, width = queries.shape
    kv_heads, total = keys.shape[1], keys.shape[2]
    if window is not None and (total <= window or length == 1):
        first = max(0, total - window)
        keys, values, window, total = keys[:, :, first:], values[:, :, first:], None, total - first
    grouped = queries[0].view(kv_heads, heads // kv_heads, length, width)
    if length == 1:  # one row sees every key: the heads of a group are the rows of one call
        own = grouped.view(1, kv_heads, heads // kv_heads, width)
        out = F.scaled_dot_product_attention(own, keys, values, scale=scaling).view(kv_heads, heads // kv_heads, 1, -1)
    elif window is not None:
        out = _masked(grouped, keys, values, scaling, window)
    elif length == total:
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scaling, enable_gqa=heads != kv_heads)
    elif queries.is_cuda and queries.dtype != torch.float32:
        bias = causal_lower_right(length, total)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scaling, enable_gqa=heads != kv_heads)
    elif _can_join(queries, values):
        out = _joined(grouped, keys, values, scaling)
    else:
        out = _masked(grouped, keys, values, scaling, None)
    return out.reshape(1, heads, length, values.shape[3]).transpose(1, 2)


def _can_join(queries: Tensor, values: Tensor) -> bool:
    wide = queries.dtype in (torch.float32, torch.float64)  # narrower outputs would be rounded twice
    return queries.device.type == "cpu" and wide and queries.shape[2] >= _MANY_ROWS and queries.shape[3] == values.shape[3]


def _joined(grouped: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """The keys before the queries' own without a mask, their own by the kernel's own causality, joined by their log-sum-exps. No
    mask is made or read, and nothing above the diagonal is computed. grouped: (Hkv, G, Q, D)."""
    group, length = grouped.shape[1:3]
    parts = []
    for place, causal in ((slice(0, keys.shape[2] - length), False), (slice(keys.shape[2] - length, None), True)):
        own = (t[0, :, None, place].expand(-1, group, -1, -1) for t in (keys, values))
        parts.append(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(grouped, *own, 0.0, causal, scale=scaling))
    (far, far_sum), (near, near_sum) = parts
    return torch.lerp(far, near, torch.sigmoid(near_sum - far_sum).unsqueeze(-1))


def _masked(grouped: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None) -> Tensor:
    """Blocks of rows, each with the keys that it may see and a mask. grouped: (Hkv, G, Q, D)."""
    kv_heads, group, length, _ = grouped.shape
    total = keys.shape[2]
    step = min(length, _ROWS)
    if grouped.is_cuda:
        step = max(1, min(step, _BLOCK_SCORES // (kv_heads * group * total)))
    out = grouped.new_empty((kv_heads, group, length, values.shape[3]))
    for start in range(0, length, step):
        stop = min(length, start + step)
        last = total - length + stop
        first = 0 if window is None else max(0, last - (stop - start) - window + 1)
        position = torch.arange(last - (stop - start), last, device=keys.device)[:, None]
        key = torch.arange(first, last, device=keys.device)
        allowed = key <= position if window is None else (key <= position) & (key > position - window)
        own_keys, own_values = (t[0, :, None, first:last].expand(-1, group, -1, -1) for t in (keys, values))
        part = grouped[:, :, start:stop]
        out[:, :, start:stop] = F.scaled_dot_product_attention(part, own_keys, own_values, attn_mask=allowed, scale=scaling)
    return out
