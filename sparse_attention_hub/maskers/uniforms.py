"""Uniform numbers as a pure function of what they belong to, so that configurations can be compared on common draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def _mix64(value: int) -> int:
    """The splitmix64 finaliser: neighbouring integers become unrelated 64-bit words."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _mix32(x: Any) -> Any:
    """A 32-bit integer finaliser on int32 tensors or uint32 arrays, in place; multiplication wraps."""
    if isinstance(x, np.ndarray):
        x ^= x >> 16
        x *= 0x7FEB352D
        x ^= x >> 15
        x *= 0x846CA68B
        x ^= x >> 16
    else:  # signed: `>>` is made logical by masking
        x ^= (x >> 16) & 0xFFFF
        x *= 0x7FEB352D
        x ^= (x >> 15) & 0x1FFFF
        x *= 0x846CA68B - 2**32
        x ^= (x >> 16) & 0xFFFF
    return x


def keyed_uniforms(seeds: list[int], layer_idx: int, kv_heads: int, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """float32 (B, kv_heads, Q, N) in [0, 1), a function of (seed, layer, kv head, query position, key position) alone.

    seeds: one integer an item. query_positions: int64 (B, Q), key_positions: int64 (B, N), both counted without padding.
    The global random state is neither read nor changed.
    """
    # Two 32-bit words for every (item, kv head), mixed in turn with the query's and the key's position.
    words = [[_mix64(_mix64((seed & _MASK64) ^ (layer_idx << 40)) ^ head) for head in range(kv_heads)] for seed in seeds]
    if key_positions.device.type == "cpu":
        return torch.from_numpy(_in_numpy(words, query_positions.numpy(), key_positions.numpy()))
    return _in_torch(words, query_positions, key_positions)


def _in_torch(words: list[list[int]], query_positions: Tensor, key_positions: Tensor) -> Tensor:
    low = _as_int32([[word & 0xFFFFFFFF for word in row] for row in words], key_positions.device)
    high = _as_int32([[word >> 32 for word in row] for row in words], key_positions.device)
    rows = query_positions.to(torch.int32)[:, None, :]
    low = _mix32(low[:, :, None] ^ (rows * -0x61C88647))
    high = _mix32(high[:, :, None] ^ (rows * 0x5851F42D))
    columns = (key_positions.to(torch.int32) * 0x2545F491)[:, None, None, :]
    bits = _mix32(_mix32(low.unsqueeze(-1) ^ columns) ^ high.unsqueeze(-1))
    uniforms: Tensor = ((bits >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24
    return uniforms


def _in_numpy(words: list[list[int]], query_positions: np.ndarray, key_positions: np.ndarray) -> np.ndarray:
    """The same bits in NumPy, whose calls on a decode step's few numbers take a third of torch's time."""
    seeds = np.array(words, dtype=np.uint64)
    rows = query_positions.astype(np.uint32)[:, None, :]
    low = _mix32((seeds & 0xFFFFFFFF).astype(np.uint32)[:, :, None] ^ (rows * np.uint32(0x9E3779B9)))
    high = _mix32((seeds >> np.uint64(32)).astype(np.uint32)[:, :, None] ^ (rows * np.uint32(0x5851F42D)))
    columns = (key_positions.astype(np.uint32) * np.uint32(0x2545F491))[:, None, None, :]
    bits = _mix32(_mix32(low[..., None] ^ columns) ^ high[..., None])
    uniforms: np.ndarray = (bits >> 8).astype(np.float32) * np.float32(2.0**-24)
    return uniforms


def _as_int32(words: list[list[int]], device: torch.device) -> Tensor:
    signed = [[word - (1 << 32) if word >= 1 << 31 else word for word in row] for row in words]
    return torch.tensor(signed, dtype=torch.int32, device=device)
