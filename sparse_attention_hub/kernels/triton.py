# mypy: disable-error-code="import-untyped,no-untyped-call"
"""Attention over lists of keys on a GPU: two Triton kernels that read only the listed keys and values, and one that merges.

`rows` has one program per (batch, query head, query), which reads that row's own list. Over several rows it reads a key once
for every row that wants it: Q * G * density times the bytes of dense attention for Q queries and G heads per group, so it is
slower than dense attention from Q = 1 / (G * density) on. `groups` has one program per (batch, kv head, tile of rows): it reads
the union of the rows' lists once and separates the rows by log weights, -inf where a row did not choose a key. So decoding (one
query) uses `rows`, unless the heads of a group share their list anyway, and several queries always use `groups`.

Both cut the list into splits, so that even one short request fills the GPU, and leave (sum of p * v, max, sum of p) per split in
float32; `merge` joins those (Flash-Decoding). Keys and values are read in place, whatever their strides.

With TRITON_INTERPRET=1, set before this module is imported, the kernels run on CPU tensors (slowly, for tests).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..lists import expand_heads, may_be_wide
from ..mask import Mask
from .reference import Call
from .triton_kernels import INTERPRETED, forks_kernel, groups_kernel, merge_kernel, rows_kernel, uniforms_kernel

KERNELS = ("rows", "groups")

#: Programs wanted per multiprocessor, and the fewest keys worth a split: its partial result costs the bytes of two keys.
PROGRAMS_PER_PROCESSOR = 4
MIN_KEYS_PER_SPLIT = 64

#: Numbers that a program of `uniforms_kernel` draws.
UNIFORMS_BLOCK = 1024


class Tile(NamedTuple):
    """rows and keys that a program of `groups` holds at once, its warps, and the blocks of keys that it loads ahead."""

    rows: int
    keys: int
    warps: int
    stages: int


#: (bytes of a number, dimensions, rows of a kv head) -> the largest tile that keeps its sums in registers and fits into the 99 KB
#: of shared memory of compute capability 8.6, found by compiling for 8.0, 8.6 and 9.0 (tests/kernels/test_triton_compile.py).
#: Their speed is not measured.
TILES = {
    (2, 64, 16): Tile(16, 64, 4, 2),
    (2, 64, 32): Tile(32, 64, 4, 2),
    (2, 64, 64): Tile(64, 64, 4, 2),
    (2, 128, 16): Tile(16, 64, 4, 2),
    (2, 128, 32): Tile(32, 64, 8, 2),
    (2, 128, 64): Tile(64, 64, 8, 1),
    (2, 256, 16): Tile(16, 64, 8, 1),
    (2, 256, 32): Tile(32, 64, 8, 1),
    (2, 256, 64): Tile(64, 32, 8, 1),
    (4, 64, 16): Tile(16, 64, 8, 2),
    (4, 64, 32): Tile(32, 64, 8, 2),
    (4, 64, 64): Tile(64, 32, 8, 2),
    (4, 128, 16): Tile(16, 32, 4, 2),
    (4, 128, 32): Tile(32, 16, 4, 2),
    (4, 128, 64): Tile(64, 16, 8, 2),
    (4, 256, 16): Tile(16, 16, 4, 2),
    (4, 256, 32): Tile(16, 16, 4, 2),
    (4, 256, 64): Tile(16, 16, 4, 2),
}
#: For more dimensions than the table has.
SMALL_TILE = Tile(16, 16, 8, 1)


def attend_triton(
    call: Call, *, kernel: str | None = None, splits: int | None = None, output_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(output (B, Q, H, D), log-sum-exp (B, H, Q) float32). Sums are float32; all tensors float32, float16 or bfloat16.

    kernel ("rows" or "groups") and splits are chosen unless given. output_dtype: default the queries' dtype.
    Raises ValueError for other dtypes, devices or kernels.
    """
    queries, values, sinks, (batch, heads, rows, _) = call.queries, call.values, call.sinks, call.mask.shape
    assert values is not None
    _check(call, kernel)
    value_dim, device = values.shape[3], queries.device
    kernel = kernel or choose_kernel(call.mask, rows, values.shape[1])
    indices, log_weight = _lists(call.mask, kernel, rows, values.shape[1])
    output = torch.empty((batch, rows, heads, value_dim), dtype=output_dtype or queries.dtype, device=device)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=device)
    if output.numel() == 0:
        return output, lse
    if indices.shape[-1] == 0:
        own = float("-inf") if sinks is None else sinks.float().view(1, -1, 1)
        return output.zero_(), torch.zeros_like(lse) + own
    with torch.cuda.device_of(queries):
        _merge(*_launch(kernel, call, values, indices, log_weight, splits), sinks, output, lse)
    return output, lse


class ForkLists(NamedTuple):
    """Lists of R rows side by side. indices int32 (Hkv, G, slots), -1 = padding; probability float32, alike, None = certain.

    table: int64 (R, 4) on the device: a row's fork, its first slot, its number of slots; the last column is the caller's. width:
    the most slots of a row."""

    indices: Tensor
    probability: Tensor | None
    table: Tensor
    width: int


def attend_forks(
    queries: Tensor, shared: tuple[Tensor, ...], own: tuple[Tensor, ...], lists: ForkLists, scaling: float,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output (R, 1, H, DV), log-sum-exp (R, H, 1)) of R rows with one query each, float32: two launches for all of them.

    queries (forks, H, 1, D). shared: keys and values (1, Hkv, P, D or DV) that come first in every fork; own: those that follow,
    (forks, Hkv, n, D or DV). All contiguous in the last dimension.
    """
    (_, heads, _, _), (keys, values) = queries.shape, shared
    rows, device = len(lists.table), queries.device
    constants = rows_constants(queries, values, lists.probability is not None, bool(softcap))
    splits = choose_splits(rows * heads, lists.width, _processors(device))
    partial = torch.empty((rows * heads, splits, values.shape[3]), dtype=torch.float32, device=device)
    top, total = (torch.empty(partial.shape[:2], dtype=torch.float32, device=device) for _ in range(2))
    output = torch.empty((rows, 1, heads, values.shape[3]), dtype=torch.float32, device=device)
    lse = torch.empty((rows, heads, 1), dtype=torch.float32, device=device)
    with torch.cuda.device_of(queries):
        forks_kernel[(rows * heads, splits)](
            queries, keys, values, *own, lists.indices, lists.indices if lists.probability is None else lists.probability,
            lists.table, partial, top, total,
            *queries.stride()[:2], *keys.stride()[1:3], *values.stride()[1:3], *own[0].stride()[:3], *own[1].stride()[:3],
            lists.indices.shape[2], heads, heads // keys.shape[1], keys.shape[2], splits, scaling, softcap or 0.0,
            **constants, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        _merge(partial, top, total, sinks, output, lse)
    return output, lse


def _merge(partial: Tensor, top: Tensor, total: Tensor, sinks: Tensor | None, output: Tensor, lse: Tensor) -> None:
    """Join the splits of all rows into the output (B, Q, H, DV) and the log-sum-exp (B, H, Q)."""
    batch, rows, heads, value_dim = output.shape
    sink = partial if sinks is None else sinks.float().contiguous()
    merge_kernel[(batch * heads * rows,)](
        partial, top, total, sink, output, lse, heads, rows, partial.shape[1],
        **merge_constants(partial.shape[1], value_dim, sinks is not None), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def draw_uniforms(halves: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """The numbers of maskers/uniforms.py, (B, kv_heads, Q, N), in one launch. halves: of words, int32 (2, B, kv_heads)."""
    (_, batch, kv_heads), rows, keys = halves.shape, query_positions.shape[1], key_positions.shape[1]
    out = torch.empty((batch, kv_heads, rows, keys), dtype=torch.float32, device=halves.device)
    with torch.cuda.device_of(halves):
        uniforms_kernel[(batch * kv_heads * rows, triton.cdiv(keys, UNIFORMS_BLOCK))](
            *halves, query_positions.contiguous(), key_positions.contiguous(), out, kv_heads, rows, keys,
            BLOCK=UNIFORMS_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def choose_kernel(mask: Mask, rows: int, kv_heads: int) -> str:
    """ "rows" for one query per head with a list of its own, "groups" otherwise (why: see the top of this module)."""
    grouped_heads = mask.shape[1] > kv_heads
    return "groups" if rows > 1 or (grouped_heads and mask.shared_heads in (1, kv_heads)) else "rows"


def choose_splits(programs: int, width: int, processors: int) -> int:
    """Into how many parts to cut `programs` lists of `width` keys, so that every processor gets enough programs."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // programs)
    return max(1, min(wanted, width // MIN_KEYS_PER_SPLIT))


def choose_block(size: int) -> int:
    """The power of two that a kernel uses for `size` rows or dimensions; tl.dot takes no less than 16."""
    return max(16, int(triton.next_power_of_2(size)))


def _lists(mask: Mask, kernel: str, rows: int, kv_heads: int) -> tuple[Tensor, Tensor | None]:
    """(indices (B, H, Q, K) for `rows`, (B, Hkv, K) for `groups`, -1 = padding; log weight (B, H, Q, K) or None)."""
    if kernel == "groups" and not (rows == 1 and mask.shared_heads in (1, kv_heads)):
        if mask.kv_heads != kv_heads:
            mask = Mask.empty(mask.shape, mask.device, kv_heads).union(mask)
        if may_be_wide(*mask.shape):
            return _every_key(mask)
        indices, _, log_weight = mask.to_indices(group=True)
        return indices, log_weight
    # As the mask holds them, padding in any place: packing them would cost a sort and a wait for the GPU in every layer.
    indices, _, probability = mask.lists()
    log_weight = None if probability is None else expand_heads(-probability.clamp(min=1e-30).log(), mask.shape[1])
    return expand_heads(indices, mask.shape[1]) if kernel == "rows" else expand_heads(indices[:, :, 0], kv_heads), log_weight


def _every_key(mask: Mask) -> tuple[Tensor, Tensor]:
    """Lists of all keys for `groups`, -1 where no row of the group chose one, without waiting for the longest."""
    batch, heads, _, keys = mask.shape
    chosen = expand_heads(mask.chosen(), heads)
    wanted = chosen.reshape(batch, mask.kv_heads, -1, keys).any(2)
    indices = torch.where(wanted, torch.arange(keys, dtype=torch.int32, device=mask.device), -1)
    weights = 0.0 if mask.is_certain else -mask.inclusion_probability().log()
    return indices, torch.where(chosen, weights, float("-inf"))


def _launch(
    kernel: str, call: Call, values: Tensor, indices: Tensor, log_weight: Tensor | None, splits: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial results of the B * H * Q rows, float32: sum of p * v (rows, splits, DV), max and sum of p (rows, splits)."""
    queries, keys, (batch, heads, rows, _) = call.queries, call.keys, call.queries.shape
    kv_heads, width, device = keys.shape[1], indices.shape[-1], queries.device
    softcap = call.softcap or 0.0
    weighted, capped = log_weight is not None, softcap > 0
    if kernel == "rows":
        function, constants, options = rows_kernel, rows_constants(queries, values, weighted, capped), {"num_warps": 4}
        programs = batch * heads * rows
        sizes: tuple[int, ...] = (heads, rows, heads // kv_heads)
    else:
        function = groups_kernel
        constants, options = groups_constants(queries, values, kv_heads, weighted, capped)
        tiles = triton.cdiv(heads // kv_heads * rows, constants["BLOCK_R"])
        programs = batch * kv_heads * tiles
        sizes = (kv_heads, rows, heads // kv_heads, tiles)
    # Whole blocks per split, and no split without keys.
    chunk = triton.cdiv(width, splits or choose_splits(programs, width, _processors(device)))
    chunk = triton.cdiv(chunk, constants["BLOCK_K"]) * constants["BLOCK_K"]
    splits = triton.cdiv(width, chunk)
    of_width = (width,) if kernel == "rows" else (width, chunk)
    partial = torch.empty((batch * heads * rows, splits, values.shape[3]), dtype=torch.float32, device=device)
    top, total = (torch.empty(partial.shape[:2], dtype=torch.float32, device=device) for _ in range(2))
    # The kernels want the last dim contiguous, and never read weights where there are none.
    indices = indices if indices.stride(-1) == 1 else indices.contiguous()
    if log_weight is not None and log_weight.stride(-1) != 1:
        log_weight = log_weight.contiguous()
    weights, weight_strides = (indices, (0, 0, 0)) if log_weight is None else (log_weight, log_weight.stride()[:-1])
    function[(programs, splits)](
        queries, keys, values, indices, weights, partial, top, total,
        *queries.stride(), *keys.stride(), *values.stride(), *indices.stride()[:-1], *weight_strides,
        *sizes, *of_width, splits, call.scaling, softcap, **constants, **options, enable_fp_fusion=True,
    )  # fmt: skip
    return partial, top, total


def rows_constants(queries: Tensor, values: Tensor, weighted: bool, capped: bool = False) -> dict[str, Any]:
    """What `rows_kernel` is compiled for, given the tensors it will read."""
    dims = _dims(queries, values)
    # Keys, values and the float32 sums of a block live in registers.
    block_k = 32 if max(dims["BLOCK_D"], dims["BLOCK_DV"]) * queries.element_size() <= 256 else 16
    return dims | {"BLOCK_K": block_k, "WEIGHTED": weighted, "CAPPED": capped}


def groups_constants(
    queries: Tensor, values: Tensor, kv_heads: int, weighted: bool, capped: bool = False
) -> tuple[dict[str, Any], dict[str, int]]:
    """What `groups_kernel` is compiled for, given the tensors it will read, and the compiler's options."""
    dims = _dims(queries, values)
    rows = queries.shape[1] // kv_heads * queries.shape[2]
    wide, many = max(64, dims["BLOCK_D"], dims["BLOCK_DV"]), min(64, choose_block(rows))
    tile = TILES.get((queries.element_size(), wide, many), SMALL_TILE)
    # The interpreter's tl.dot multiplies the raw bits of bfloat16 numbers.
    upcast = INTERPRETED and queries.dtype == torch.bfloat16
    own = {"BLOCK_K": tile.keys, "BLOCK_R": tile.rows, "WEIGHTED": weighted, "CAPPED": capped, "UPCAST": upcast}
    return dims | own, {"num_warps": tile.warps, "num_stages": tile.stages}


def _dims(queries: Tensor, values: Tensor) -> dict[str, int]:
    dim, value_dim = queries.shape[3], values.shape[3]
    return {"D": dim, "DV": value_dim, "BLOCK_D": choose_block(dim), "BLOCK_DV": choose_block(value_dim)}


def merge_constants(splits: int, value_dim: int, sinks: bool = False) -> dict[str, Any]:
    """What `merge_kernel` is compiled for."""
    block_s = min(triton.next_power_of_2(splits), 16)
    return {"DV": value_dim, "BLOCK_DV": choose_block(value_dim), "BLOCK_S": block_s, "SINKS": sinks}


def _check(call: Call, kernel: str | None) -> None:
    if kernel is not None and kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    dtypes = {tensor.dtype for tensor in call[:3] if tensor is not None}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float16, torch.bfloat16}:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(f"the triton backend takes one dtype of float32, float16 and bfloat16, got {names}")
    if not INTERPRETED and not call.queries.is_cuda:
        raise ValueError(f"the triton backend takes tensors on a GPU, got {call.queries.device}")


@lru_cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
