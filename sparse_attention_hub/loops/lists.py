"""Lists of chosen keys: made from flags, joined, counted."""

import numpy as np

from .compiled import compiled


@compiled
def pack(flags, lists):
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
                for t in range(found, lists.shape[3]):
                    lists[b, h, q, t] = -1


@compiled
def join(first, first_counts, first_p, second, second_counts, second_p, keys, lists, counts, probability):
    """The keys of either list (B, h, Q, K); one in both has p + q - pq. Probabilities: None = 1, in the joined list too."""
    batch, heads, rows, width = lists.shape
    at = np.zeros(keys, np.int64)  # place of a key in the joined list, counted over all rows: no row has to clean up
    start = 1
    for b in range(batch):
        for h in range(heads):
            i, k = h * first.shape[1] // heads, h * second.shape[1] // heads
            for q in range(rows):
                own, other, out, count = first[b, i, q], second[b, k, q], lists[b, h, q], first_counts[b, i, q]
                for t in range(count):
                    out[t] = own[t]
                    at[own[t]] = start + t
                if probability is not None:
                    for t in range(count):
                        probability[b, h, q, t] = 1 if first_p is None else first_p[b, i, q, t]
                for t in range(second_counts[b, k, q]):
                    place = at[other[t]] - start
                    if place < 0:
                        out[count] = other[t]
                    if probability is not None:
                        p = np.float32(1) if second_p is None else second_p[b, k, q, t]
                        if place < 0:
                            probability[b, h, q, count] = p
                        else:
                            probability[b, h, q, place] += p - p * probability[b, h, q, place]
                    count += place < 0
                for t in range(count, width):
                    out[t] = -1
                counts[b, h, q] = count
                start += width


@compiled
def append(first, first_counts, first_p, second, second_counts, second_p, lists, counts, probability):
    """`join` of lists that share no key: half its time."""
    batch, heads, rows, width = lists.shape
    for b in range(batch):
        for h in range(heads):
            i, k = h * first.shape[1] // heads, h * second.shape[1] // heads
            for q in range(rows):
                own, total = first_counts[b, i, q], first_counts[b, i, q] + second_counts[b, k, q]
                for t in range(own):
                    lists[b, h, q, t] = first[b, i, q, t]
                for t in range(own, total):
                    lists[b, h, q, t] = second[b, k, q, t - own]
                for t in range(total, width):
                    lists[b, h, q, t] = -1
                if probability is not None:
                    for t in range(own):
                        probability[b, h, q, t] = 1 if first_p is None else first_p[b, i, q, t]
                    for t in range(own, total):
                        probability[b, h, q, t] = 1 if second_p is None else second_p[b, k, q, t - own]
                counts[b, h, q] = total


@compiled
def count_groups(lists, counts, keys, out):
    """Distinct keys in the lists (B, H, Q, K) of a kv head's query heads: out (B, Hkv, Q)."""
    batch, heads, rows, _ = lists.shape
    group = heads // out.shape[1]
    stamps = np.zeros(keys, np.int64)  # the last turn in which a key was seen
    turn = 0
    for b in range(batch):
        for h in range(out.shape[1]):
            for q in range(rows):
                turn += 1
                found = 0
                for g in range(h * group, (h + 1) * group):
                    for t in range(counts[b, g, q]):
                        found += stamps[lists[b, g, q, t]] != turn
                        stamps[lists[b, g, q, t]] = turn
                out[b, h, q] = found
