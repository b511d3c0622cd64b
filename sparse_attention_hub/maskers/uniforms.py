"""Uniform numbers as a pure function of what they belong to, so that configurations can be compared on common draws."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..kernels import HAS_TRITON
from ..lists import as_arrays, uses_loops

_MASK64 = (1 << 64) - 1
#: What query positions are multiplied with, for each half of a word: 0x9E3779B9 and 0x5851F42D as int32.
FACTORS = (-0x61C88647, 0x5851F42D)


def keyed_uniforms(
    seeds: list[int], layers: tuple[int, ...], kv_heads: int, query_positions: Tensor, key_positions: Tensor
) -> Tensor:
    """float32 (B, kv_heads, Q, N) in [0, 1), a function of (seed, layer, kv head, query position, key position) alone.

    seeds: one integer per item. layers: one of all items, or one per item. query_positions: int64 (B, Q), key_positions: int64 (B, N),
    both counted without padding.
    The global random state is neither read nor changed.
    """
    call = tuple(seeds), layers, kv_heads
    if not uses_loops(key_positions):
        halves, factors = _halves(*call, key_positions.device)
        if key_positions.is_cuda and HAS_TRITON:
            from ..kernels.triton import draw_uniforms

            return draw_uniforms(halves.squeeze(-1), query_positions, key_positions)
        return _in_torch((halves, factors), query_positions, key_positions)
    from ..loops.random import keyed_uniforms as fill

    words = _words(*call)
    uniforms = torch.empty((*words.shape, query_positions.shape[1], key_positions.shape[1]), dtype=torch.float32)
    fill(*as_arrays(words, query_positions, key_positions, uniforms))
    return uniforms


def _words(seeds: tuple[int, ...], layers: tuple[int, ...], kv_heads: int) -> np.ndarray:
    """64 bits for every (item, kv head); each half is mixed in turn with the query's and the key's position."""
    items = zip(seeds, layers * len(seeds) if len(layers) == 1 else layers, strict=True)
    hashes = [[_mix64(_mix64((seed & _MASK64) ^ (layer << 40)) ^ head) for head in range(kv_heads)] for seed, layer in items]
    return np.array(hashes, np.uint64)


@lru_cache(maxsize=512)
def _halves(seeds: tuple[int, ...], layers: tuple[int, ...], kv_heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lower and upper halves of the words, int32 (2, B, kv_heads, 1), and what query positions are multiplied with for each,
    int32 (2, 1, 1, 1); copied to the device once per layer or group of layers."""
    with torch.inference_mode(False):
        words = _words(seeds, layers, kv_heads).view(np.int64)
        halves = np.stack([words, words >> 32]).astype(np.int32)[..., None]
        factors = torch.tensor(FACTORS, dtype=torch.int32).view(2, 1, 1, 1)
        return torch.from_numpy(halves).to(device), factors.to(device)


def _mix64(value: int) -> int:
    """The splitmix64 finaliser: neighbouring integers become unrelated 64-bit words."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _in_torch(halves: tuple[Tensor, Tensor], query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """The bits of loops/random.py in int32 tensors: conversions keep the low 32 bits, and products wrap."""
    low, high = _mix32(halves[0] ^ (query_positions.to(torch.int32)[:, None, :] * halves[1])).unbind()
    columns = (key_positions.to(torch.int32) * 0x2545F491)[:, None, None, :]
    bits = _mix32(_mix32(low.unsqueeze(-1) ^ columns) ^ high.unsqueeze(-1))
    return ((bits >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def _mix32(x: Tensor) -> Tensor:
    """A 32-bit integer finaliser, in place; `>>` copies the sign, which the masks clear."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16) & 0xFFFF
    return x
