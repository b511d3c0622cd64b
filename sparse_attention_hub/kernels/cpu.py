"""Attention on a CPU: compiled loops over the mask's lists, keys and values read in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..lists import as_arrays
from ..loops.attend import attend as attend_loop
from ..loops.attend import dot_all as dot_all_loop
from ..loops.attend import dot_lists as dot_loop
from ..loops.compiled import as_bits, in_threads
from ..mask import Mask
from .reference import Call, Known

#: Above this share of the keys, several rows are done sooner by matrix products than by reading keys row by row:
#: 1.3x at 27%, 1.8x at 50%.
DENSE_SHARE = 0.2
#: Numbers in a block of weights.
_BLOCK = 2**20
#: Numbers read below which one thread is done sooner than two.
_ALONE = 2**17


def attend_cpu(call: Call) -> tuple[Tensor | None, Tensor]:
    """(output (B, Q, H, D) or None, log-sum-exp (B, H, Q)), float32 or wider."""
    values, (batch, heads, rows, total) = call.values, call.mask.shape
    lists, units = call.mask.lists(), _units(call.mask)
    grouped, scale, cap = _grouped(call.queries, units, call.scaling, call.softcap or 0.0)
    key_rows, key_starts = _table(call.keys, units)
    value_rows, value_starts = (None, key_starts) if values is None else _table(values, units)
    width = 0 if values is None else values.shape[3]
    output = np.empty((batch, rows, units, heads // units, width), grouped.dtype)
    lse, totals = np.empty((2, batch, units, heads // units, rows), grouped.dtype)
    sink = (
        np.full(heads, -np.inf, grouped.dtype)
        if call.sinks is None
        else call.sinks.detach().to(torch.from_numpy(grouped).dtype).numpy()
    )
    dense = values is not None and rows > 1 and float(lists.counts.sum()) > DENSE_SHARE * lists.counts.numel() * total
    known = Known(call.scores()) if dense and call.known.scores is None else call.known
    scores, terms, highest = (None if t is None else t.contiguous().view(*lse.shape, -1).numpy() for t in known[:3])
    arguments = (
        grouped, key_rows, key_starts, None if dense else value_rows, value_starts, scores, terms,
        lse if highest is None else highest[..., 0], *as_arrays(lists), scale, cap, sink.reshape(units, -1), output, lse, totals,
    )  # fmt: skip
    if dense:
        assert values is not None
        output = _multiply(arguments, values, output.shape)
        output /= np.where(totals > 0, totals, 1).transpose(0, 3, 1, 2)[..., None]
    else:
        in_threads(attend_loop, batch * units * rows, _threads(call), *arguments, None)
    found = None if values is None else torch.from_numpy(output.reshape(batch, rows, heads, width))
    return found, torch.from_numpy(lse.reshape(batch, heads, rows))


def _multiply(arguments: tuple[Any, ...], values: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Weighted sums (B, Q, h, G, DV) as matrix products: rows of a kv head at a time, as many as fit a core's cache."""
    batch, rows, units, group, width = shape
    kv_heads, keys, wide = values.shape[1], values.shape[2], torch.from_numpy(arguments[0]).dtype
    each = units * rows // kv_heads  # units of a kv head
    step = max(1, min(each, _BLOCK // (group * keys)))
    spread = torch.empty((step, group, keys), dtype=wide)
    output = torch.empty((batch, units, rows, group, width), dtype=wide).view(batch * kv_heads, each, group, width)
    for head in range(batch * kv_heads):
        own = values[head // kv_heads, head % kv_heads].to(wide)
        for start in range(0, each, step):
            part = spread[: min(step, each - start)]
            attend_loop(head * each + start, head * each + start + len(part), *arguments, part.numpy())
            torch.matmul(part, own, out=output[head, start : start + len(part)])
    return output.view(batch, units, rows, group, width).transpose(1, 2).numpy()


def dot_cpu(call: Call) -> Tensor:
    """Logits of the mask's keys, in the order of its lists: float32 or wider (B, H, Q, K), -inf on padding."""
    batch, heads, rows, _ = call.mask.shape
    lists, units = call.mask.lists(), _units(call.mask)
    grouped, scale, cap = _grouped(call.queries, units, call.scaling, call.softcap or 0.0)
    out = np.empty((batch, units, rows, heads // units, lists.indices.shape[3]), grouped.dtype)
    table = _table(call.keys, units)
    in_threads(dot_loop, batch * units * rows, _threads(call), grouped, *table, *as_arrays(lists[:2]), scale, cap, out)
    return torch.from_numpy(out).transpose(2, 3).reshape(batch, heads, rows, -1)


def dot_all_cpu(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """`group_scores` of one query row: float32 or wider (B, H, 1, N)."""
    (batch, heads), (units, total) = queries.shape[:2], keys.shape[1:3]
    grouped, scale = _grouped(queries, units, scaling)
    out = np.empty((batch, units, heads // units, total), grouped.dtype)
    threads = 1 if keys.numel() < _ALONE else torch.get_num_threads()
    in_threads(dot_all_loop, batch * units, threads, grouped, *_table(keys, units), scale, out)
    return torch.from_numpy(out).view(batch, heads, 1, total)


def _units(mask: Mask) -> int:
    """For how many heads the keys are read separately: once a kv head where the query heads of a group share their lists."""
    return mask.kv_heads if mask.shared_heads in (1, mask.kv_heads) else mask.shape[1]


def _grouped(queries: Tensor, units: int, *numbers: float) -> tuple[Any, ...]:
    """Queries as (B, h, Q, G, D), float32 or wider; the numbers in their type."""
    batch, heads, rows, dim = queries.shape
    wide = queries.to(torch.promote_types(queries.dtype, torch.float32))
    grouped = wide.reshape(batch, units, heads // units, rows, dim).transpose(2, 3).contiguous().numpy()
    return grouped, *(grouped.dtype.type(number) for number in numbers)


def _table(tensor: Tensor, units: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, h, N, D) as one table of rows (M, D), and the row at which each unit's keys begin, int64 (B, units).

    A cache hands over the front part of a longer buffer: its rows are addressed where they lie, without a copy.
    """
    batch, held, total, dim = tensor.shape
    strides = tensor.stride()
    if strides[3] != 1 or strides[2] != dim or strides[0] % dim or strides[1] % dim:
        tensor = tensor.contiguous()
        strides = tensor.stride()
    item, head = strides[0] // dim, strides[1] // dim
    rows = tensor.as_strided(((batch - 1) * item + (held - 1) * head + total, dim), (dim, 1))
    return as_bits(rows), np.arange(batch)[:, None] * item + np.arange(units) * held // units * head


def _threads(call: Call) -> int:
    return 1 if call.mask.lists().indices.numel() * call.queries.shape[3] < _ALONE else torch.get_num_threads()
