"""Attention on a CPU: compiled loops over the mask's lists, keys and values read in place."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..lists import KeyLists, as_arrays
from ..loops.attend import attend as attend_loop
from ..loops.attend import dot_lists as dot_loop
from ..loops.compiled import as_bits, in_threads
from ..mask import Mask
from .reference import Known, group_scores

#: Above this share of the keys, several rows are done sooner by matrix products than by reading keys row by row:
#: 1.3x at 27%, 1.8x at 50%.
DENSE_SHARE = 0.2
#: Numbers in a block of weights.
_BLOCK = 2**20
#: Numbers read below which one thread is done sooner than two.
_ALONE = 2**17


def attend_cpu(
    queries: Tensor,
    keys: Tensor,
    values: Tensor | None,
    mask: Mask,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    known: Known | None = None,
) -> tuple[Tensor | None, Tensor]:
    """(output (B, Q, H, D), log-sum-exp (B, H, Q)), float32 or wider; see kernels.attend. values None: no output."""
    batch, heads, rows, _ = queries.shape
    lists, units = mask.lists(), _units(mask)
    grouped, scale, cap = _grouped(queries, units, scaling, softcap)
    key_rows, key_starts = _table(keys, units)
    value_rows, value_starts = (None, key_starts) if values is None else _table(values, units)
    width = 0 if values is None else values.shape[3]
    output = np.empty((batch, rows, units, heads // units, width), grouped.dtype)
    lse, totals = np.empty((2, batch, units, heads // units, rows), grouped.dtype)
    sink = _no_sinks(heads, grouped.dtype) if sinks is None else sinks.detach().cpu().numpy().astype(grouped.dtype)
    dense = values is not None and rows > 1 and float(lists.counts.sum()) > DENSE_SHARE * lists.counts.numel() * keys.shape[2]
    if dense and (known is None or known.scores is None):
        known = Known(group_scores(queries.detach(), keys.detach(), scaling, softcap))
    scores, terms, highest = (None, None, None) if known is None else (_by_unit(t, lse.shape) for t in known[:3])
    call = (
        grouped, key_rows, key_starts, None if dense else value_rows, value_starts, scores, terms,
        lse if highest is None else highest[..., 0], *as_arrays(lists), scale, cap, sink.reshape(units, -1), output, lse, totals,
    )  # fmt: skip
    if dense:
        assert values is not None
        output = _multiply(call, values, output.shape)
        output /= np.where(totals > 0, totals, 1).transpose(0, 3, 1, 2)[..., None]
    else:
        in_threads(attend_loop, batch * units * rows, _threads(lists, queries), *call, None)
    found = None if values is None else torch.from_numpy(output.reshape(batch, rows, heads, width))
    return found, torch.from_numpy(lse.reshape(batch, heads, rows))


def _multiply(call: tuple[Any, ...], values: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Weighted sums (B, Q, h, G, DV) as matrix products: rows of a kv head at a time, as many as fit a core's cache."""
    batch, rows, units, group, width = shape
    kv_heads, keys, wide = values.shape[1], values.shape[2], torch.from_numpy(call[0]).dtype
    each = units * rows // kv_heads  # units of a kv head
    step = max(1, min(each, _BLOCK // (group * keys)))
    spread = torch.empty((step, group, keys), dtype=wide)
    output = torch.empty((batch, units, rows, group, width), dtype=wide).view(batch * kv_heads, each, group, width)
    for head in range(batch * kv_heads):
        own = values[head // kv_heads, head % kv_heads].detach().to(wide)
        for start in range(0, each, step):
            part = spread[: min(step, each - start)].zero_()
            attend_loop(head * each + start, head * each + start + len(part), *call, part.numpy())
            torch.matmul(part, own, out=output[head, start : start + len(part)])
    return output.view(batch, units, rows, group, width).transpose(1, 2).numpy()


def dot_cpu(queries: Tensor, keys: Tensor, mask: Mask, scaling: float, softcap: float | None = None) -> Tensor:
    """Logits of the mask's keys, in the order of its lists: float32 or wider (B, H, Q, K), -inf on padding."""
    batch, heads, rows, _ = queries.shape
    lists, units = mask.lists(), _units(mask)
    grouped, scale, cap = _grouped(queries, units, scaling, softcap)
    out = np.empty((batch, units, rows, heads // units, lists.indices.shape[3]), grouped.dtype)
    in_threads(
        dot_loop, batch * units * rows, _threads(lists, queries), grouped, *_table(keys, units), *as_arrays(lists[:2]), scale, cap, out
    )  # fmt: skip
    return torch.from_numpy(out).transpose(2, 3).reshape(batch, heads, rows, -1)


def _units(mask: Mask) -> int:
    """For how many heads the keys are read separately: once a kv head where the query heads of a group share their lists."""
    return mask.kv_heads if mask.shared_heads in (1, mask.kv_heads) else mask.shape[1]


def _grouped(queries: Tensor, units: int, scaling: float, softcap: float | None) -> tuple[np.ndarray, np.generic, np.generic]:
    """Queries as (B, h, Q, G, D), float32 or wider; scaling and softcap in their type."""
    batch, heads, rows, dim = queries.shape
    wide = queries.detach().to(torch.promote_types(queries.dtype, torch.float32))
    grouped = wide.reshape(batch, units, heads // units, rows, dim).transpose(2, 3).contiguous().numpy()
    return grouped, grouped.dtype.type(scaling), grouped.dtype.type(softcap or 0.0)


def _by_unit(tensor: Tensor | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """(B, H, Q, ...) as (B, h, G, Q, ...)."""
    return None if tensor is None else tensor.contiguous().view(*shape, -1).numpy()


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
    rows = tensor.detach().as_strided(((batch - 1) * item + (held - 1) * head + total, dim), (dim, 1))
    return as_bits(rows), _starts(batch, item, units, held, head)


@lru_cache(maxsize=64)
def _starts(batch: int, item: int, units: int, held: int, head: int) -> np.ndarray:
    return np.arange(batch)[:, None] * item + np.arange(units) * held // units * head


@lru_cache(maxsize=8)
def _no_sinks(heads: int, dtype: np.dtype) -> np.ndarray:
    return np.full(heads, -np.inf, dtype)


def _threads(lists: KeyLists, queries: Tensor) -> int:
    return 1 if lists.indices.numel() * queries.shape[3] < _ALONE else torch.get_num_threads()
