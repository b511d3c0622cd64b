"""Dense attention on a filled cache, causal at the lower right, without copies of the cache for each query head.

torch's `is_causal` aligns at the upper left, and its masked path repeats keys and values for every query head of a
group: both are wrong or slow for a question on a long prefix. Here the kv heads are the batch on a CPU, and the query heads
of a group are rows of one product on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

#: Scores held at once, in numbers: 128 MiB in float32.
_BLOCK_SCORES = 32 * 2**20
#: Rows a block, on a CPU and under a window.
_ROWS = 512
#: Below so many rows, one masked call on a CPU is sooner done than two.
_FEW_ROWS = 32


def dense_rows(queries: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None = None) -> Tensor:
    """Causal attention of queries (1, H, Q, D), the last Q positions, over keys and values (1, Hkv, N, D).

    window: each query attends to its last `window` keys, itself included. Returns (1, Q, H, D) in the queries' dtype.
    """
    length, total = queries.shape[2], keys.shape[2]
    if window is not None and total <= window:
        window = None
    if length == 1:
        if window is not None:
            keys, values = keys[:, :, total - window :], values[:, :, total - window :]
        return _one_row(queries, keys, values, scaling)
    if window is None and length == total:
        grouped = queries.shape[1] != keys.shape[1]
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2)
    if queries.device.type == "cpu":
        wide = queries.dtype in (torch.float32, torch.float64)  # narrower outputs would be rounded twice
        if window is None and wide and length >= _FEW_ROWS and queries.shape[3] == values.shape[3]:
            return _joined(queries, keys, values, scaling)
        return _masked(queries, keys, values, scaling, window)
    if window is None and queries.is_cuda and queries.dtype != torch.float32:
        bias = causal_lower_right(length, total)
        grouped = queries.shape[1] != keys.shape[1]
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2)
    return _blocks(queries, keys, values, scaling, window)


def _one_row(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    heads, kv_heads = queries.shape[1], keys.shape[1]
    grouped = queries.reshape(1, kv_heads, heads // kv_heads, queries.shape[3])
    out = F.scaled_dot_product_attention(grouped, keys, values, scale=scaling)
    return out.reshape(1, 1, heads, values.shape[3])


def _spans(length: int, total: int, step: int, window: int | None) -> Iterator[tuple[int, int, int, int]]:
    """Blocks of `step` rows, from `start` to `stop`, and the keys that one of them may see, from `first` to `last`."""
    for start in range(0, length, step):
        stop = min(length, start + step)
        first = 0 if window is None else max(0, total - length + start - window + 1)
        yield start, stop, first, total - length + stop


def _joined(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """For a CPU: the keys before the queries' own without a mask, their own by the kernel's own causality, the two outputs
    joined by their log-sum-exps. No mask is made or read, and nothing above the diagonal is computed: a sixth less time than
    one masked call."""
    _, heads, length, width = queries.shape
    kv_heads, before = keys.shape[1], keys.shape[2] - length
    grouped = queries[0].view(kv_heads, heads // kv_heads, length, width)
    parts = []
    for place, causal in ((slice(0, before), False), (slice(before, None), True)):
        own = (t[0, :, None, place].expand(-1, heads // kv_heads, -1, -1) for t in (keys, values))
        parts.append(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(grouped, *own, 0.0, causal, scale=scaling))
    (far, far_sum), (near, near_sum) = parts
    out = torch.lerp(far, near, torch.sigmoid(near_sum - far_sum).unsqueeze(-1))
    return out.view(1, heads, length, width).transpose(1, 2)


def _masked(queries: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None) -> Tensor:
    """For a CPU, whose fused kernel takes masks at little cost: blocks of rows, each with the keys that it may see."""
    _, heads, length, width = queries.shape
    kv_heads, total = keys.shape[1], keys.shape[2]
    step = min(length, _ROWS)
    out = queries.new_empty((1, heads, length, values.shape[3]))
    for start, stop, first, last in _spans(length, total, step, window):
        position = torch.arange(last - (stop - start), last)[:, None]
        key = torch.arange(first, last)[None]
        allowed = key <= position
        if window is not None:
            allowed &= key > position - window
        grouped = queries[0, :, start:stop].view(kv_heads, heads // kv_heads, stop - start, width)
        own_keys, own_values = (t[0, :, None, first:last].expand(-1, heads // kv_heads, -1, -1) for t in (keys, values))
        part = F.scaled_dot_product_attention(grouped, own_keys, own_values, attn_mask=allowed, scale=scaling)
        out[0, :, start:stop] = part.view(heads, stop - start, -1)
    return out.transpose(1, 2)


def _blocks(queries: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None) -> Tensor:
    heads, length, total = queries.shape[1], queries.shape[2], keys.shape[2]
    step = max(1, min(length, _BLOCK_SCORES // (heads * total)))
    if window is not None:
        step = min(length, _ROWS)
    out = queries.new_empty((1, length, heads, values.shape[3]))
    for start, stop, first, last in _spans(length, total, step, window):
        out[:, start:stop] = _block(
            queries[:, :, start:stop], keys[:, :, first:last], values[:, :, first:last], scaling, window
        )
    return out


def _block(queries: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None) -> Tensor:
    """Rows that are the last ones of these keys; softmax in float32."""
    _, heads, rows, width = queries.shape
    kv_heads, total = keys.shape[1], keys.shape[2]
    grouped = queries.reshape(1, kv_heads, (heads // kv_heads) * rows, width)
    scores = torch.matmul(grouped.float() * scaling, keys.float().transpose(2, 3))
    scores = scores.view(1, kv_heads, heads // kv_heads, rows, total)
    position = torch.arange(total - rows, total, device=keys.device)[:, None]
    if window is None:
        recent = torch.arange(total - rows, total, device=keys.device)[None]
        scores[..., total - rows :].masked_fill_(recent > position, float("-inf"))
    else:
        key = torch.arange(total, device=keys.device)[None]
        scores.masked_fill_((key > position) | (key <= position - window), float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(values.dtype).view(1, kv_heads, -1, total)
    return torch.matmul(weights, values).view(1, heads, rows, values.shape[3]).transpose(1, 2)
