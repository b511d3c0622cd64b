"""Attention on a CPU: compiled loops over the mask's lists, keys and values read in place."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..loops.attend import attend as attend_loop
from ..loops.attend import dot_lists as dot_loop
from ..loops.compiled import as_array, in_threads
from ..mask import Mask
from .known import Known

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
    dtype = grouped.dtype
    key_rows, key_starts = _table(keys, units)
    value_rows, value_starts = (None, key_starts) if values is None else _table(values, units)
    width = 0 if values is None else values.shape[3]
    output = np.empty((batch, rows, units, heads // units, width), dtype)
    lse = np.empty((batch, units, heads // units, rows), dtype)
    sink = np.full(heads, -np.inf, dtype) if sinks is None else sinks.detach().cpu().numpy().astype(dtype)
    per_unit = (batch, units, heads // units, rows)

    def own(tensor: Tensor | None) -> np.ndarray | None:
        return None if tensor is None else tensor.contiguous().view(*per_unit, -1).numpy()

    scores, terms, highest = map(own, known or Known())
    highest = lse if highest is None else highest.reshape(per_unit)
    in_threads(
        attend_loop, batch * units * rows, _threads(lists.indices.numel() * queries.shape[3]), grouped, key_rows, key_starts,
        value_rows, value_starts, scores, terms, highest, lists.indices.numpy(), lists.counts.numpy(),
        None if lists.probability is None else lists.probability.numpy(), scale, cap, sink.reshape(units, -1), output, lse,
    )  # fmt: skip
    found = None if values is None else torch.from_numpy(output.reshape(batch, rows, heads, width))
    return found, torch.from_numpy(lse.reshape(batch, heads, rows))


def dot_cpu(queries: Tensor, keys: Tensor, mask: Mask, scaling: float, softcap: float | None = None) -> Tensor:
    """Logits of the mask's keys, in the order of its lists: float32 or wider (B, H, Q, K), -inf on padding."""
    batch, heads, rows, _ = queries.shape
    lists, units = mask.lists(), _units(mask)
    grouped, scale, cap = _grouped(queries, units, scaling, softcap)
    out = np.empty((batch, units, rows, heads // units, lists.indices.shape[3]), grouped.dtype)
    threads = _threads(lists.indices.numel() * queries.shape[3])
    in_threads(
        dot_loop, batch * units * rows, threads, grouped, *_table(keys, units), lists.indices.numpy(), lists.counts.numpy(),
        scale, cap, out,
    )  # fmt: skip
    return torch.from_numpy(out).transpose(2, 3).reshape(batch, heads, rows, -1)


def _units(mask: Mask) -> int:
    """For how many heads the keys are read separately: once a kv head where the query heads of a group share their lists."""
    return mask.kv_heads if mask.shared_heads in (1, mask.kv_heads) else mask.shape[1]


def _grouped(queries: Tensor, units: int, scaling: float, softcap: float | None) -> tuple[np.ndarray, np.generic, np.generic]:
    """Queries as (B, h, Q, G, D), float32 or wider; scaling and softcap in their type."""
    batch, heads, rows, dim = queries.shape
    wide = queries.detach().to(torch.promote_types(queries.dtype, torch.float32))
    grouped = wide.view(batch, units, heads // units, rows, dim).transpose(2, 3).contiguous().numpy()
    return grouped, grouped.dtype.type(scaling), grouped.dtype.type(softcap or 0.0)


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
    starts = np.arange(batch)[:, None] * item + np.arange(units) * held // units * head
    return as_array(rows), starts


def _threads(numbers: int) -> int:
    return 1 if numbers < _ALONE else torch.get_num_threads()
