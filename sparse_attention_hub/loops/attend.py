"""Softmax attention over lists of keys, keys and values read in place.

A unit is one list: of an item, a kv head or query head, and a query row. The G query heads that share it are neighbours:
queries (B, h, Q, G, D), scores (B, h, G, Q, N), output (B, Q, h, G, DV), lse (B, h, G, Q). Keys and values are tables of rows,
(M, D) and (M, DV); `starts` (B, h) say at which row a unit's keys begin.
"""

import numpy as np

from .compiled import compiled, prefetch, widen

#: Below this share of a row's mass, exponentials relative to the row's highest score have lost too many bits.
LEAST_SHARED_MASS = 1e-12
#: Keys between one that is prefetched and the one in work: when decoding, one row reads a key and no other (several rows find
#: keys in a core's cache, where prefetching costs 1.5x).
AHEAD = 12


@compiled
def attend(
    start, stop, queries, keys, key_starts, values, value_starts, scores, terms, highest, lists, counts, probability,
    scaling, softcap, sinks, output, lse, totals, spread,
):  # fmt: skip
    """Fill output, lse and totals (alike) for units [start, stop). values None: no output. spread (stop - start, G, N) gets
    the weights of all keys, 0 where not listed, to be multiplied with values and divided by totals.

    queries: float32 or wider. scores: logits, where they are known: keys are then not read. terms: exp(scores - highest), where
    known. softcap: 0 = none. sinks (h, G): logits that join the denominator, -inf = none. A row without keys gives 0 and -inf.
    """
    _, units, rows, group, _ = queries.shape
    zero = scaling - scaling
    weights = np.empty((group, lists.shape[3]), queries.dtype)
    for unit in range(start, stop):
        b, h, q = unit // (units * rows), unit // rows % units, unit % rows
        held = h * lists.shape[1] // units
        index, count = lists[b, held, q], counts[b, held, q]
        if scores is None:
            _dot(queries[b, h, q], keys, key_starts[b, h], index, count, scaling, softcap, rows == 1, weights)
        for g in range(group):
            weight, sink = weights[g], sinks[h, g]
            total, top = zero, sink
            if terms is not None:
                top, row = highest[b, h, g, q], terms[b, h, g, q]
                for t in range(count):
                    weight[t] = row[np.uint32(index[t])]  # unsigned: not checked for counting from the end, 1.1x
                if probability is not None:
                    p = probability[b, held, q]
                    for t in range(count):
                        weight[t] /= p[t]
                for t in range(count):  # a loop of its own: the compiler makes vectors of it
                    total += weight[t]
            if terms is None or total < LEAST_SHARED_MASS:
                total, top = zero, sink
                for t in range(count):
                    if scores is not None:
                        weight[t] = scores[b, h, g, q, index[t]]
                    top = max(top, weight[t])
                if top == -np.inf:
                    top = zero
                for t in range(count):
                    weight[t] = np.exp(weight[t] - top)
                if probability is not None:
                    p = probability[b, held, q]
                    for t in range(count):
                        weight[t] /= p[t]
                for t in range(count):
                    total += weight[t]
            total += np.exp(sink - top)
            totals[b, h, g, q] = total
            lse[b, h, g, q] = top + np.log(total)
            if spread is not None:
                out_row = spread[unit - start, g]
                out_row[:] = 0  # here, row by row: it is in a core's cache when weights are written into it
                for t in range(count):
                    out_row[np.uint32(index[t])] = weight[t]
        if values is not None:
            out = output[b, q, h]
            _sum(values, value_starts[b, h], index, count, weights, rows == 1, out)
            for g in range(group):
                scale = totals[b, h, g, q] if totals[b, h, g, q] > 0 else scaling
                for d in range(out.shape[1]):
                    out[g, d] /= scale


@compiled
def _dot(queries, keys, first, index, count, scaling, softcap, far, out):
    """Logits of listed keys: queries (G, D) to out (G, K). Four keys at a time: 1.2x, more keys are on their way from memory.
    far: the keys are in memory, not in a core's cache."""
    zero, last = scaling - scaling, count - 1
    for t in range(0, count, 4):  # the last keys are repeated up to four
        for i in range(t + AHEAD, min(t + AHEAD + 4, count if far else 0)):
            prefetch(keys, first + index[i])
        k0, k1 = keys[first + index[t]], keys[first + index[min(t + 1, last)]]
        k2, k3 = keys[first + index[min(t + 2, last)]], keys[first + index[min(t + 3, last)]]
        for g in range(queries.shape[0]):
            x0 = x1 = x2 = x3 = zero
            for d in range(queries.shape[1]):
                x = queries[g, d]
                x0 += x * widen(k0[d])
                x1 += x * widen(k1[d])
                x2 += x * widen(k2[d])
                x3 += x * widen(k3[d])
            out[g, min(t + 3, last)], out[g, min(t + 2, last)] = x3 * scaling, x2 * scaling
            out[g, min(t + 1, last)], out[g, t] = x1 * scaling, x0 * scaling
    if softcap > 0:
        for g in range(queries.shape[0]):
            for t in range(count):
                out[g, t] = softcap * np.tanh(out[g, t] / softcap)


@compiled
def _sum(values, first, index, count, weights, far, out):
    """Weighted sums of listed values: weights (G, K) to out (G, DV). Four keys at a time: 1.2x, a sum is stored once for them."""
    out[:] = 0
    whole = count - count % 4
    for t in range(0, whole, 4):
        for i in range(t + AHEAD, min(t + AHEAD + 4, count if far else 0)):
            prefetch(values, first + index[i])
        v0, v1 = values[first + index[t]], values[first + index[t + 1]]
        v2, v3 = values[first + index[t + 2]], values[first + index[t + 3]]
        for g in range(out.shape[0]):
            w0, w1, w2, w3 = weights[g, t], weights[g, t + 1], weights[g, t + 2], weights[g, t + 3]
            for d in range(out.shape[1]):
                out[g, d] += w0 * widen(v0[d]) + w1 * widen(v1[d]) + w2 * widen(v2[d]) + w3 * widen(v3[d])
    for t in range(whole, count):
        v0 = values[first + index[t]]
        for g in range(out.shape[0]):
            for d in range(out.shape[1]):
                out[g, d] += weights[g, t] * widen(v0[d])


@compiled
def dot_lists(start, stop, queries, keys, key_starts, lists, counts, scaling, softcap, out):
    """The logits alone: out (B, h, Q, G, K), -inf on padding."""
    _, units, rows, _, _ = queries.shape
    for unit in range(start, stop):
        b, h, q = unit // (units * rows), unit // rows % units, unit % rows
        held = h * lists.shape[1] // units
        out[b, h, q] = -np.inf
        _dot(
            queries[b, h, q], keys, key_starts[b, h], lists[b, held, q], counts[b, held, q], scaling, softcap, rows == 1, out[b, h, q]
        )  # fmt: skip


@compiled
def dot_all(start, stop, queries, keys, key_starts, scaling, out):
    """Logits of all keys, of units of one query row: queries (B, h, 1, G, D), out (B, h, G, N). Four keys at a time, as `_dot`."""
    _, units, _, group, dim = queries.shape
    zero, total = scaling - scaling, out.shape[3]
    for unit in range(start, stop):
        b, h = unit // units, unit % units
        first = key_starts[b, h]
        for t in range(0, total, 4):  # the last keys are repeated up to four
            t1, t2, t3 = min(t + 1, total - 1), min(t + 2, total - 1), min(t + 3, total - 1)
            k0, k1, k2, k3 = keys[first + t], keys[first + t1], keys[first + t2], keys[first + t3]
            for g in range(group):
                x0 = x1 = x2 = x3 = zero
                for d in range(dim):
                    x = queries[b, h, 0, g, d]
                    x0 += x * widen(k0[d])
                    x1 += x * widen(k1[d])
                    x2 += x * widen(k2[d])
                    x3 += x * widen(k3[d])
                out[b, h, g, t3], out[b, h, g, t2] = x3 * scaling, x2 * scaling
                out[b, h, g, t1], out[b, h, g, t] = x1 * scaling, x0 * scaling
