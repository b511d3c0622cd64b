"""Uniform numbers from integer hashes: the bits that maskers/uniforms.py makes with torch on other devices."""

import numpy as np

from .compiled import compiled


@compiled
def keyed_uniforms(words, query_positions, key_positions, out):
    """Fill out float32 (B, h, Q, N), given words uint64 (B, h) and positions int64 (B, Q) and (B, N)."""
    batch, heads, rows, keys = out.shape
    for b in range(batch):
        for h in range(heads):
            for q in range(rows):
                row, uniforms = query_positions[b, q], out[b, h, q]
                low = _mix(np.uint32(words[b, h]) ^ np.uint32(row * 0x9E3779B9))
                high = _mix(np.uint32(words[b, h] >> np.uint64(32)) ^ np.uint32(row * 0x5851F42D))
                for j in range(keys):
                    bits = _mix(_mix(low ^ np.uint32(key_positions[b, j] * 0x2545F491)) ^ high)
                    uniforms[j] = np.float32(np.int32(bits >> np.uint32(8))) * np.float32(2.0**-24)


@compiled
def _mix(x):
    """A 32-bit integer finaliser. Numba widens every result to 64 bits, so each step cuts it back."""
    x = np.uint32(x)
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))
