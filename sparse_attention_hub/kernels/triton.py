# mypy: disable-error-code="import-untyped,no-untyped-call"
"""Gathered attention on a GPU: two Triton kernels that read only the keys and values a mask names, and one that merges.

`rows` has one program for each (batch, query head, query) and reads that row's own list. Over several rows it reads a
key once for every row that wants it: Q * G * density times the dense bytes for Q queries and G heads a group, so it is
slower than dense attention from Q = 1 / (G * density) on. `groups` has one program for each (batch, kv head, tile of
rows): it reads the union of the rows' lists once and tells the rows apart by log weights, -inf where a row did not
choose a key. So decoding (one query) uses `rows`, unless the heads of a group share their list anyway, and several
queries always use `groups`.

Both cut the list into splits, so that even one short request fills the GPU, and leave (sum of p * v, max, sum of p) a
split in float32; `merge` joins those (Flash-Decoding). Keys and values are read in place, whatever their strides.

With TRITON_INTERPRET=1, set before this module is imported, the kernels run on CPU tensors (slowly, for tests).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..lists import expand_heads
from ..mask import Mask
from .triton_kernels import INTERPRETED, groups_kernel, merge_kernel, rows_kernel

KERNELS = ("rows", "groups")

#: Programs a multiprocessor should have to work on, and the fewest keys a split is worth: one split's partial result
#: costs the bytes of two keys.
PROGRAMS_PER_PROCESSOR = 4
MIN_KEYS_PER_SPLIT = 64

#: Bytes of keys and values that `groups` may hold in shared memory (a GPU of compute capability 8.6 or 8.9 has 99 KB).
SHARED_BYTES = 64 * 1024
GROUPS_STAGES = 2


def attend_triton(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Mask,
    scaling: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: str | None = None,
    splits: int | None = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(output (B, Q, H, D), log-sum-exp (B, H, Q) float32); a row without keys gives 0 and -inf. Sums are float32.

    queries (B, H, Q, D), keys and values (B, Hkv, N, D), all float32, float16 or bfloat16 and on one device.
    kernel ("rows" or "groups") and splits are chosen unless given. output_dtype: default the queries' dtype.
    Raises ValueError for other dtypes, devices or kernels.
    """
    _check(queries, keys, values, kernel)
    batch, heads, rows, _ = queries.shape
    kv_heads = keys.shape[1]
    if kernel is None:
        kernel = choose_kernel(mask, queries.shape[2], kv_heads)
    indices, log_weight = _rows_lists(mask) if kernel == "rows" else _groups_lists(mask, rows, kv_heads)
    output_dtype, device = output_dtype or queries.dtype, queries.device
    output = torch.empty((batch, rows, heads, values.shape[3]), dtype=output_dtype, device=device)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=device)
    if output.numel() == 0:
        return output, lse
    if indices.shape[-1] == 0:
        own = float("-inf") if sinks is None else sinks.float().view(1, -1, 1)
        return output.zero_(), torch.zeros_like(lse) + own
    launch = _launch_rows if kernel == "rows" else _launch_groups
    with torch.cuda.device_of(queries):
        partial, top, total = launch(queries, keys, values, indices, log_weight, scaling, softcap or 0.0, splits)
        _launch_merge(partial, top, total, sinks, output, lse)
    return output, lse


def choose_kernel(mask: Mask, rows: int, kv_heads: int) -> str:
    """ "rows" for one query a head whose list is its own, "groups" otherwise (why: see the top of this module)."""
    grouped_heads = mask.shape[1] > kv_heads
    return "groups" if rows > 1 or (grouped_heads and mask.shared_heads in (1, kv_heads)) else "rows"


def choose_splits(programs: int, width: int, processors: int) -> int:
    """Into how many parts to cut `programs` lists of `width` keys, so that every processor gets enough programs."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // programs)
    return max(1, min(wanted, width // MIN_KEYS_PER_SPLIT))


def choose_block(size: int) -> int:
    """The power of two that a kernel uses for `size` rows or dimensions; tl.dot takes no less than 16."""
    return max(16, int(triton.next_power_of_2(size)))


# -- lists ------------------------------------------------------------------------------------------------------------


def _rows_lists(mask: Mask) -> tuple[Tensor, Tensor | None]:
    """(indices (B, H, Q, K), -1 = padding in any place; log weight alike or None). Shared lists are not copied.

    The lists are used as the mask holds them: packing them would cost a sort and a wait for the GPU in every layer.
    """
    indices, _, probability = mask.lists()
    heads = mask.shape[1]
    log_weight = None if probability is None else expand_heads(_log_weight(probability), heads)
    return expand_heads(indices, heads), log_weight


def _groups_lists(mask: Mask, rows: int, kv_heads: int) -> tuple[Tensor, Tensor | None]:
    """(indices (B, Hkv, K), -1 = padding; log weight (B, H, Q, K) or None)."""
    heads = mask.shape[1]
    if rows == 1 and mask.shared_heads in (1, kv_heads):
        indices, _, probability = mask.lists()
        log_weight = None if probability is None else expand_heads(_log_weight(probability), heads)
        return expand_heads(indices[:, :, 0], kv_heads), log_weight
    if mask.kv_heads != kv_heads:
        mask = Mask.empty(mask.shape, mask.device, kv_heads).union(mask)
    indices, _, log_weight = mask.to_indices(group=True)
    return indices, log_weight


def _log_weight(probability: Tensor) -> Tensor:
    return -probability.clamp(min=1e-30).log()


# -- launches ---------------------------------------------------------------------------------------------------------


def _launch_rows(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    log_weight: Tensor | None,
    scaling: float,
    softcap: float,
    splits: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, _ = queries.shape
    programs, width = batch * heads * rows, indices.shape[-1]
    constants = rows_constants(queries, values, log_weight is not None, softcap > 0)
    splits, chunk = _cut(width, splits or choose_splits(programs, width, _processors(queries)), constants["BLOCK_K"])
    partial, top, total = _partials(programs, splits, values)
    indices, weights, weight_strides = _list_arguments(indices, log_weight)
    rows_kernel[(programs, splits)](
        queries, keys, values, indices, weights, partial, top, total,
        *queries.stride(), *keys.stride(), *values.stride(), *indices.stride()[:3], *weight_strides,
        heads, rows, heads // keys.shape[1], width, chunk, splits, scaling, softcap,
        **constants, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return partial, top, total


def _launch_groups(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    log_weight: Tensor | None,
    scaling: float,
    softcap: float,
    splits: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, _ = queries.shape
    kv_heads, width = keys.shape[1], indices.shape[-1]
    constants = groups_constants(queries, values, kv_heads, log_weight is not None, softcap > 0)
    tiles = triton.cdiv(heads // kv_heads * rows, constants["BLOCK_R"])
    programs = batch * kv_heads * tiles
    splits, chunk = _cut(width, splits or choose_splits(programs, width, _processors(queries)), constants["BLOCK_K"])
    partial, top, total = _partials(batch * heads * rows, splits, values)
    indices, weights, weight_strides = _list_arguments(indices, log_weight)
    groups_kernel[(programs, splits)](
        queries, keys, values, indices, weights, partial, top, total,
        *queries.stride(), *keys.stride(), *values.stride(), *indices.stride()[:2], *weight_strides,
        kv_heads, rows, heads // kv_heads, tiles, width, chunk, splits, scaling, softcap,
        **constants, num_warps=groups_warps(constants), num_stages=GROUPS_STAGES, enable_fp_fusion=True,
    )  # fmt: skip
    return partial, top, total


def _launch_merge(partial: Tensor, top: Tensor, total: Tensor, sinks: Tensor | None, output: Tensor, lse: Tensor) -> None:
    batch, rows, heads, dim = output.shape
    merge_kernel[(batch * heads * rows,)](
        partial, top, total, partial if sinks is None else sinks.float().contiguous(), output, lse, heads, rows, partial.shape[1],
        **merge_constants(partial.shape[1], dim, sinks is not None), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def rows_constants(queries: Tensor, values: Tensor, weighted: bool, capped: bool = False) -> dict[str, Any]:
    """What `rows_kernel` is compiled for, given the tensors it will read."""
    dim, value_dim = queries.shape[3], values.shape[3]
    widest = max(choose_block(dim), choose_block(value_dim))
    return {
        "D": dim, "DV": value_dim, "BLOCK_D": choose_block(dim), "BLOCK_DV": choose_block(value_dim),
        # Keys, values and the float32 sums of a block live in registers.
        "BLOCK_K": 32 if widest <= 128 else 16, "WEIGHTED": weighted, "CAPPED": capped,
    }  # fmt: skip


def groups_constants(queries: Tensor, values: Tensor, kv_heads: int, weighted: bool, capped: bool = False) -> dict[str, Any]:
    """What `groups_kernel` is compiled for, given the tensors it will read."""
    dim, value_dim = queries.shape[3], values.shape[3]
    block_d, block_dv = choose_block(dim), choose_block(value_dim)
    bytes_per_key = (block_d + block_dv) * queries.element_size() * GROUPS_STAGES
    block_k = next((size for size in (64, 32) if size * bytes_per_key <= SHARED_BYTES), 16)
    # Wider tiles read a key for more rows at once, but keys and values share the registers and the memory with them.
    rows = queries.shape[1] // kv_heads * queries.shape[2]
    block_r = min(choose_block(rows), 64 if block_k == 64 else 32 if block_k == 32 else 16)
    return {
        "D": dim, "DV": value_dim, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "BLOCK_K": block_k, "BLOCK_R": block_r,
        "WEIGHTED": weighted, "CAPPED": capped,
        # The interpreter's tl.dot multiplies the raw bits of bfloat16 numbers.
        "UPCAST": INTERPRETED and queries.dtype == torch.bfloat16,
    }  # fmt: skip


def groups_warps(constants: dict[str, Any]) -> int:
    """Warps a program of `groups_kernel`: with 4, tiles of 8,192 sums and more do not fit the registers."""
    return 8 if constants["BLOCK_R"] * constants["BLOCK_DV"] >= 8192 else 4


def merge_constants(splits: int, value_dim: int, sinks: bool = False) -> dict[str, Any]:
    """What `merge_kernel` is compiled for."""
    block_dv = choose_block(value_dim)
    return {"DV": value_dim, "BLOCK_DV": block_dv, "BLOCK_S": min(triton.next_power_of_2(splits), 16), "SINKS": sinks}


def _cut(width: int, splits: int, block: int) -> tuple[int, int]:
    """(splits, keys a split): whole blocks, and no split without keys."""
    chunk = triton.cdiv(triton.cdiv(width, splits), block) * block
    return triton.cdiv(width, chunk), chunk


def _partials(rows: int, splits: int, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def room(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=values.device)

    return room(rows, splits, values.shape[3]), room(rows, splits), room(rows, splits)


def _list_arguments(indices: Tensor, log_weight: Tensor | None) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Lists as the kernels take them: the last dim contiguous. Without weights a kernel never reads the second one."""
    if indices.stride(-1) != 1:
        indices = indices.contiguous()
    if log_weight is None:
        return indices, indices, (0, 0, 0)
    if log_weight.stride(-1) != 1:
        log_weight = log_weight.contiguous()
    return indices, log_weight, log_weight.stride()[:3]


def _check(queries: Tensor, keys: Tensor, values: Tensor, kernel: str | None) -> None:
    if kernel is not None and kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    dtypes = {queries.dtype, keys.dtype, values.dtype}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float16, torch.bfloat16}:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(f"the triton backend takes one dtype of float32, float16 and bfloat16, got {names}")
    if not INTERPRETED and not queries.is_cuda:
        raise ValueError(f"the triton backend takes tensors on a GPU, got {queries.device}")


def _processors(tensor: Tensor) -> int:
    return _count_processors(tensor.device.index or 0) if tensor.is_cuda else 1


@lru_cache
def _count_processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
