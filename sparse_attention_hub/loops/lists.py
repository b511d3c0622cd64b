"""Lists of chosen keys: made from flags, packed, joined, counted."""

from __future__ import annotations

import numpy as np

from .compiled import compiled


@compiled
def pack(flags: np.ndarray, lists: np.ndarray) -> None:
    """Where flags bool (B, h, Q, N) are set: lists (B, h, Q, K), in rising order, -1 behind them."""
    batch, heads, rows, keys = flags.shape
    for b in range(batch):
        for h in range(heads):
            for q in range(rows):
                found = 0
                for j in range(keys):
                    if flags[b, h, q, j]:
                        lists[b, h, q, found] = j
                        found += 1
                lists[b, h, q, found:] = -1


@compiled
def join(
    first: np.ndarray,
    first_counts: np.ndarray,
    first_p: np.ndarray | None,
    second: np.ndarray,
    second_counts: np.ndarray,
    second_p: np.ndarray | None,
    keys: int,
    apart: bool,
    lists: np.ndarray,
    counts: np.ndarray,
    probability: np.ndarray | None,
) -> None:
    """The keys of either list (B, h, Q, K); one in both has p + q - pq. None as a p means certain. apart: none is in both."""
    batch, heads, rows, _ = lists.shape
    at = np.zeros(keys, np.int32)  # place of a key in the joined list, 1 = the first; 0 = not in it
    for b in range(batch):
        for h in range(heads):
            i, k = h * first.shape[1] // heads, h * second.shape[1] // heads
            for q in range(rows):
                out, count = lists[b, h, q], first_counts[b, i, q]
                if apart:
                    own, other, added = first[b, i, q], second[b, k, q], second_counts[b, k, q]
                    for t in range(count):
                        out[t] = own[t]
                    for t in range(added):
                        out[count + t] = other[t]
                    if probability is not None:
                        p = probability[b, h, q]
                        for t in range(count):
                            p[t] = 1.0 if first_p is None else first_p[b, i, q, t]
                        for t in range(added):
                            p[count + t] = 1.0 if second_p is None else second_p[b, k, q, t]
                    for t in range(count + added, out.size):
                        out[t] = -1
                    counts[b, h, q] = count + added
                    continue
                for t in range(count):
                    out[t] = first[b, i, q, t]
                    at[out[t]] = t + 1
                    if probability is not None:
                        probability[b, h, q, t] = 1.0 if first_p is None else first_p[b, i, q, t]
                for t in range(second_counts[b, k, q]):
                    j = second[b, k, q, t]
                    if probability is not None:
                        p = 1.0 if second_p is None else second_p[b, k, q, t]
                        if at[j] > 0:
                            own = probability[b, h, q, at[j] - 1]
                            probability[b, h, q, at[j] - 1] = own + p - own * p
                        else:
                            probability[b, h, q, count] = p
                    out[min(count, out.size - 1)] = j  # branch-free: a key that is there is overwritten by the next
                    count += at[j] == 0
                for t in range(first_counts[b, i, q]):
                    at[first[b, i, q, t]] = 0
                out[count:] = -1
                counts[b, h, q] = count


@compiled
def count_groups(lists: np.ndarray, counts: np.ndarray, keys: int, out: np.ndarray) -> None:
    """Distinct keys in the lists (B, H, Q, K) of a kv head's query heads: out (B, Hkv, Q)."""
    batch, heads, rows, _ = lists.shape
    group = heads // out.shape[1]
    seen = np.zeros(keys, np.int64)
    turn = 0
    for b in range(batch):
        for h in range(out.shape[1]):
            for q in range(rows):
                turn += 1
                found = 0
                for g in range(h * group, (h + 1) * group):
                    for t in range(counts[b, g, q]):
                        j = lists[b, g, q, t]
                        if seen[j] != turn:
                            seen[j] = turn
                            found += 1
                out[b, h, q] = found
