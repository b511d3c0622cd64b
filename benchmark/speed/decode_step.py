"""Tensors and dense forms of one decode step, shaped like Llama-3.1-8B, and the times of steps over lists of keys."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark.speed.common import Figures, Step, take_turns
from sparse_attention_hub import Mask
from sparse_attention_hub.kernels import attend, dot_all
from sparse_attention_hub.kernels.reference import group_scores
from sparse_attention_hub.loops.attend import AHEAD
from sparse_attention_hub.loops.compiled import compiled, prefetch

HEADS, KV_HEADS, DIM = 32, 8, 128


def measure_cpu(keys: int, rounds: int, kinds: Iterable[tuple[str, float]]) -> Figures:
    """Milliseconds per step, decoding one token of one request in one layer, and ratios of the dense steps to ours.

    kinds: lists and density of each step ("own": a list per query head, "shared": one per kv head). code_speedup: scores of pages'
    bounds by the loop that selectors use, against a matrix product.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    queries, cache = tensors(1, keys, torch.float32, "cpu")
    dense: dict[str, Step] = {
        "dense_products": lambda: dense_products(queries, *cache),
        "dense_sdpa": lambda: dense_fused(queries, *cache),
    }
    ours = {f"{lists}_{density:.0%}": list_step(queries, cache, lists, density, "cpu")[0] for lists, density in kinds}
    codes = tensors(1, keys // 16, torch.float32, "cpu", 2 * DIM)  # as many as Quest has for pages of 16 keys
    scores: dict[str, Step] = {
        "code_products": lambda: group_scores(codes[0], codes[1][0], 1.0),
        "code_loop": lambda: dot_all(codes[0], codes[1][0], 1.0),
    }
    seen = take_turns(dense | ours | scores, rounds)
    torch.set_num_threads(threads)
    figures = {f"cpu_{name}_ms": 1e3 * median(times[name] for times in seen) for name in seen[0]}
    for name in ours:
        figures[f"cpu_{name}_speedup"] = median(times["dense_products"] / times[name] for times in seen)
        figures[f"cpu_{name}_over_sdpa"] = median(times["dense_sdpa"] / times[name] for times in seen)
    figures["cpu_code_speedup"] = median(times["code_products"] / times["code_loop"] for times in seen)
    return figures


def measure_gpu(lengths: list[int], batch: int, density: float) -> Figures:
    """For every length: microseconds per step, ratios of dense to ours, and the share of the copy bandwidth that is reached."""
    source, target = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda")
    bandwidth = 2 * source.numel() / _gpu_seconds(lambda: target.copy_(source))  # bytes per second, read and written
    figures = {"gpu_copy_gb_per_s": bandwidth / 1e9}
    for keys in lengths:
        queries, cache = tensors(batch, keys, torch.bfloat16, "cuda")
        dense = _gpu_seconds(lambda: dense_fused(queries, *cache))  # noqa: B023 (called at once)
        figures[f"gpu_{keys}_dense_us"] = 1e6 * dense
        for name in ("own", "shared"):
            step, entries = list_step(queries, cache, name, density, "triton")
            seconds = _gpu_seconds(step)
            read = entries * (4 + 2 * 2 * DIM)  # bytes: the key's index, the key and the value
            figures[f"gpu_{keys}_{name}_us"] = 1e6 * seconds
            figures[f"gpu_{keys}_{name}_speedup"] = dense / seconds
            figures[f"gpu_{keys}_{name}_bandwidth_share"] = read / bandwidth / seconds
    return figures


def tensors(batch: int, keys: int, dtype: torch.dtype, device: str, dim: int = DIM) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Random queries (batch, HEADS, 1, dim), keys and values (batch, KV_HEADS, keys, dim)."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return normal(batch, HEADS, 1, dim), (normal(batch, KV_HEADS, keys, dim), normal(batch, KV_HEADS, keys, dim))


def dense_products(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Grouped matrix products: one per kv head for the scores, one for the values."""
    grouped = (queries * DIM**-0.5).view(1, KV_HEADS, -1, DIM)
    weights: Tensor = (grouped @ keys.transpose(-1, -2)).softmax(-1)
    return weights @ values


def dense_fused(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The query heads of a group as rows of one head: torch then reads every key once, without repeating keys."""
    return F.scaled_dot_product_attention(queries.view(queries.shape[0], KV_HEADS, -1, DIM), keys, values)


def list_step(queries: Tensor, cache: tuple[Tensor, Tensor], lists: str, density: float, backend: str) -> tuple[Step, int]:
    """(attention over lists of randomly chosen keys, number of list entries)."""
    batch, heads, keys = len(queries), HEADS if lists == "own" else KV_HEADS, cache[0].shape[2]
    chosen = random_lists(batch, heads, keys, density).to(queries.device)
    mask = Mask.from_indices(chosen, (batch, HEADS, 1, keys), kv_heads=KV_HEADS)
    return lambda: attend(queries, *cache, mask, DIM**-0.5, backend), chosen.numel()


def random_lists(batch: int, heads: int, keys: int, density: float) -> Tensor:
    """Numbers of randomly chosen keys: (batch, heads, 1, K)."""
    order = torch.rand((batch, heads, 1, keys), generator=torch.Generator().manual_seed(1))
    return order.topk(max(1, int(density * keys)), dim=-1, sorted=False).indices


def sum_rows(cache: tuple[Tensor, Tensor], lists: Tensor) -> None:
    """Read listed rows of keys and values (1, Hkv, N, D), float32, and no more: lists (Hkv, K)."""
    total = np.zeros(cache[0].shape[3], np.float32)
    for table in cache:
        for rows, own in zip(table[0].numpy(), lists.numpy(), strict=True):
            _sum_rows(rows, own, total)


@compiled
def _sum_rows(table: np.ndarray, index: np.ndarray, total: np.ndarray) -> None:
    for t in range(len(index)):
        if t + AHEAD < len(index):
            prefetch(table, index[t + AHEAD])
        row = table[index[t]]
        for d in range(total.shape[0]):
            total[d] += row[d]


def _gpu_seconds(step: Step) -> float:
    """GPU seconds, the median. The step is replayed as a CUDA graph, which leaves out the time of launching its kernels, with a
    cold L2 cache, as in a model, where other layers run in between."""
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return float(do_bench(graph.replay, return_mode="median")) / 1e3
