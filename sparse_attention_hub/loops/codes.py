"""Codes of keys: signs packed into words, words compared, table entries summed, a few channels multiplied."""

import numpy as np

from .compiled import compiled, widen


@compiled
def pack_bits(bits, out):
    """bits bool (M, n) as words of integers: out (M, words)."""
    width = 8 * out.itemsize
    for i in range(out.shape[0]):
        for w in range(out.shape[1]):
            word = 0
            for place in range(min(width, bits.shape[1] - w * width)):
                word |= bits[i, w * width + place] << place
            out[i, w] = word


@compiled
def find_matches(queries, keys, least, out):
    """Which keys share at least `least` words with a query: queries (B, h, R, L), keys (B, h, N, L), out bool (B, h, R, N)."""
    batch, heads, rows, total = out.shape
    for b in range(batch):
        for h in range(heads):
            for r in range(rows):
                query = queries[b, h, r]
                for n in range(total):
                    key = keys[b, h, n]
                    found = np.uint32(0)  # 2x over a sum of 64 bits
                    for word in range(key.size):
                        found = np.uint32(found + np.uint32(key[word] == query[word]))
                    out[b, h, r, n] = found >= least


@compiled
def score_bits(queries, keys, out):
    """Minus the number of bits that differ: see maskers/codes.py. queries, keys int32; out float32 (B, h, G, Q, N)."""
    batch, heads, group, rows, total = out.shape
    for b in range(batch):
        for h in range(heads):
            for g in range(group):
                codes = keys[b, h, :, g % keys.shape[3]]
                for q in range(rows):
                    query, scores = queries[b, h, g, q], out[b, h, g, q]
                    for n in range(total):
                        differ = np.int32(0)
                        for word in range(query.size):
                            differ += _count_bits(np.uint32(query[word] ^ codes[n, word]))
                        scores[n] = -differ


@compiled
def _count_bits(x):
    """How many bits of a uint32 word are 1: sums of neighbouring bits, pairs, nibbles, then all four bytes. Numba widens every
    result to 64 bits, so each step cuts it back."""
    x = np.uint32(x - ((x >> np.uint32(1)) & np.uint32(0x55555555)))
    x = np.uint32((x & np.uint32(0x33333333)) + ((x >> np.uint32(2)) & np.uint32(0x33333333)))
    x = np.uint32((x + (x >> np.uint32(4))) & np.uint32(0x0F0F0F0F))
    return np.int32(np.uint32(x * np.uint32(0x01010101)) >> np.uint32(24))


@compiled
def sum_codes(table, codes, out):
    """Sums of the table's entries that a key's codes name: table (B, h, R, G, C), codes (B, h, N, G), out (B, h, R, N)."""
    batch, heads, rows, groups, _ = table.shape
    for b in range(batch):
        for h in range(heads):
            keys = codes[b, h]
            for r in range(rows):
                scores = out[b, h, r]
                for n in range(scores.size):
                    scores[n] = 0
                for g in range(groups):
                    own = table[b, h, r, g]
                    for n in range(scores.size):
                        scores[n] += own[keys[n, g]]


@compiled
def score_channels(queries, channels, keys, out):
    """q.k over some channels of keys (B, h, N, D): queries (B, h, G, r) are given in these channels, (B, h, r); out (B, h, G, N)."""
    batch, heads, group, total = out.shape
    key = np.empty(channels.shape[2], queries.dtype)
    for b in range(batch):
        for h in range(heads):
            for n in range(total):
                for c in range(key.size):
                    key[c] = widen(keys[b, h, n, channels[b, h, c]])
                for g in range(group):
                    score = key[0] * queries[b, h, g, 0]
                    for c in range(1, key.size):
                        score += key[c] * queries[b, h, g, c]
                    out[b, h, g, n] = score
