"""Choosing among the keys that nothing took yet: by an order, by a threshold, by pages.

Scores are higher for better keys, and of the lowest number of their type where a key is not allowed. Of keys that tie for the
last places the most recent are taken, so that the choice depends neither on padding nor on the machine. `taken` lists keys
that are not to be chosen. Rows with fewer keys take all.
"""

import numpy as np

from .attend import LEAST_SHARED_MASS
from .compiled import compiled


@compiled
def pack_ranks(scores, out):
    """float32 scores (R, N) as int64 numbers that rank alike, of equal scores the most recent key higher: the score's bits, made
    to rise with it, above the key's index."""
    for r in range(scores.shape[0]):
        bits = scores[r].view(np.int32)
        for j in range(scores.shape[1]):
            rising = bits[j] if bits[j] >= 0 else np.int32(bits[j] ^ 0x7FFFFFFF)
            out[r, j] = np.int64(rising) << 32 | j


@compiled
def unpack_order(ranks, out):
    """Keys by falling rank, from ranks (R, N) that were sorted: int32."""
    keys = ranks.shape[1]
    for r in range(ranks.shape[0]):
        for j in range(keys):
            out[r, j] = np.int32(ranks[r, keys - 1 - j] & 0x7FFFFFFF)


@compiled
def walk(order, lengths, taken, taken_counts, taken_p, sizes, drawn, lists, counts, probability):
    """The taken keys, then the first sizes (B, h, Q) keys of a row's order (B, h', Q, N) that are not taken: lists (B, h, Q, K).
    lengths (B, Q): allowed keys, which come first in the order. drawn: p of the latter keys is their share of all that are left,
    else 1. Probabilities: None = 1, in the joined list too."""
    batch, heads, rows, width = lists.shape
    # Bytes that are cleared for each row: 1.3x faster than wider row numbers, which need no clearing.
    is_free = np.empty(order.shape[3], np.uint8)
    for b in range(batch):
        for h in range(heads):
            i, k = h * order.shape[1] // heads, h * taken.shape[1] // heads
            for q in range(rows):
                own, first, out = order[b, i, q], taken[b, k, q], lists[b, h, q]
                count, length = np.int64(taken_counts[b, k, q]), np.int64(lengths[b, q])
                is_free[:] = 1
                for t in range(count):
                    out[t] = first[t]
                for t in range(count):
                    is_free[np.uint32(first[t])] = 0  # unsigned: not checked for counting from the end
                found, t, end = count, 0, count + sizes[b, h, q]
                while found < end and t < length:
                    out[found] = own[t]  # branch-free: taken keys are overwritten by the next one
                    found += is_free[np.uint32(own[t])]
                    t += 1
                for t in range(found, width):
                    out[t] = -1
                counts[b, h, q] = found
                if probability is not None:
                    p = np.float32(found - count) / np.float32(length - count) if drawn else np.float32(1)
                    for t in range(count):
                        probability[b, h, q, t] = 1 if taken_p is None else taken_p[b, k, q, t]
                    for t in range(count, found):
                        probability[b, h, q, t] = p


@compiled
def choose(bits, flip, lowest, allowed, taken, taken_counts, sizes, lists, counts):
    """The sizes (B, h'', Q or 1) highest keys of each row: lists (B, h, Q, K) in rising order. allowed: bool (B, Q, N), None = all.

    bits (B, h', Q, N): scores as integers; flip: which bits to change in those below 0, so that they rise as the scores do.
    """
    batch, heads, rows, width = lists.shape
    keys = bits.shape[3]
    left, pivot = np.empty(keys, bits.dtype), np.empty(1, bits.dtype)
    reached = np.empty(keys + 1, np.int32)
    for b in range(batch):
        for h in range(heads):
            i, k = h * bits.shape[1] // heads, h * taken.shape[1] // heads
            for q in range(rows):
                own, out = bits[b, i, q], lists[b, h, q]
                size = min(keys, sizes[b, h * sizes.shape[1] // heads, q if sizes.shape[2] > 1 else 0])
                for j in range(keys):
                    left[j] = own[j] if own[j] >= 0 else own[j] ^ flip
                if allowed is not None:
                    for j in range(keys):
                        left[j] = left[j] if allowed[b, q, j] else lowest
                for t in range(taken_counts[b, k, q]):
                    left[np.uint32(taken[b, k, q, t])] = lowest
                _guess_pivot(left, size, lowest, pivot)
                found = _keep_from(left, pivot[0], reached)
                if found < size:  # the guess was too high
                    found = _keep_from(left, lowest + 1, reached)
                for t in range(found):
                    left[t] = left[np.uint32(reached[t])]  # reached[t] >= t: not overwritten before it is read
                excess = _find_pivot(left[:found], size, lowest, pivot)
                for t in range(found if excess > 0 else 0):  # of keys that tie for the last places the oldest are left out
                    if excess > 0 and left[t] == pivot[0]:
                        left[t], excess = lowest, excess - 1
                total = 0
                for t in range(found):
                    reached[np.uint32(total)] = reached[t]
                    total += left[t] >= pivot[0]
                for t in range(total):
                    out[t] = reached[t]
                for t in range(total, width):
                    out[t] = -1
                counts[b, h, q] = total


@compiled
def _keep_from(left, least, reached):
    """Which of a row's numbers reach `least`; returns how many."""
    found = 0
    for j in range(left.size):
        reached[np.uint32(found)] = j  # branch-free: overwritten unless the number counts
        found += left[j] >= least
    return found


@compiled
def _guess_pivot(left, size, lowest, pivot):
    """A number that `size` of a row's numbers and some more are likely to reach, by every 16th of them."""
    sample = left[::16].copy()
    share = size / 16
    _find_pivot(sample, np.int64(share + 3 * np.sqrt(share) + 3), lowest, pivot)


@compiled
def _find_pivot(left, size, lowest, pivot):
    """Halves the range of a row's numbers until `size` of them, or all that are above the lowest, reach the pivot. Returns how many
    do beyond that: they equal it. A count takes a twentieth of a pass that branches."""
    high = np.int64(lowest)
    for j in range(left.size):
        high = max(high, left[j])
    low = pivot[0] = lowest + 1
    found = _count_from(left, pivot[0])
    if found <= size:
        return 0
    high += 1
    while found > size and high > low + 1:
        pivot[0] = middle = (low >> 1) + (high >> 1) + (low & high & 1)
        reach = _count_from(left, pivot[0])
        if reach < size:
            high = middle
        else:
            low, found = middle, reach
    pivot[0] = low
    return found - size


@compiled
def _count_from(left, least):
    found = np.int32(0)
    for j in range(left.size):
        found = np.int32(found + np.int32(left[j] >= least))
    return found


@compiled
def count_mass(order, lengths, scores, terms, taken, taken_counts, share, sizes):
    """How many of a row's keys, in falling order of score, hold more than a share of the mass that is not taken: sizes
    (B, H, Q). Keys that tie with the last one count too. terms: exponentials of the scores, where known."""
    batch, heads, rows, keys = order.shape
    stamps = np.zeros(keys, np.int32)
    turn = 0
    left = np.empty(keys, np.int64)
    mass = np.empty(keys, np.float64)
    for b in range(batch):
        for h in range(heads):
            k = h * taken.shape[1] // heads
            for q in range(rows):
                turn += 1
                for t in range(taken_counts[b, k, q]):
                    stamps[taken[b, k, q, t]] = turn
                found = 0
                for t in range(lengths[b, q]):
                    left[found] = order[b, h, q, t]
                    found += stamps[order[b, h, q, t]] != turn
                total = 0.0
                if terms is not None:
                    for t in range(found):
                        total += terms[b, h, q, left[t]]
                        mass[t] = total
                if total < LEAST_SHARED_MASS:
                    total = 0.0
                    for t in range(found):
                        total += np.exp(scores[b, h, q, left[t]] - scores[b, h, q, left[0]])
                        mass[t] = total
                size = 0
                while size < found and (
                    size == 0
                    or mass[size - 1] <= share * total
                    or scores[b, h, q, left[size]] == scores[b, h, q, left[size - 1]]
                ):
                    size += 1
                sizes[b, h, q] = size


@compiled
def expand_pages(pages, counts, starts, page, allowed, lists, out):
    """The allowed keys of chosen pages (B, H, Q, P): lists (B, H, Q, K) and their counts. Page i of an item holds the keys from
    starts[b] + i * page on; allowed bool (B, Q, N)."""
    batch, heads, rows, _ = lists.shape
    for b in range(batch):
        for h in range(heads):
            for q in range(rows):
                found = 0
                for t in range(counts[b, h, q]):
                    first = starts[b] + pages[b, h, q, t] * page
                    for j in range(first, min(first + page, allowed.shape[2])):
                        if allowed[b, q, j]:
                            lists[b, h, q, found] = j
                            found += 1
                for t in range(found, lists.shape[3]):
                    lists[b, h, q, t] = -1
                out[b, h, q] = found
