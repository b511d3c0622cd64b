"""What a sample of a row's softmax terms tells of the others."""

import numpy as np

from .attend import LEAST_SHARED_MASS
from .compiled import compiled


@compiled
def estimate_mass(lengths, lists, counts, chosen, scores, terms, highest, sinks, out):
    """Of each row, from the sample that its list holds behind the first `chosen` (B, h', Q) keys: the terms' standard deviation,
    with one standard error of the variance added; the softmax denominator; keys that the list lacks; samples. out float64
    (4, B, H, Q); the first two are relative to one number per row.

    lengths (B, Q): allowed keys. lists: all p are 1. scores, terms, highest: see attend. sinks (H,): -inf = none.
    """
    _, batch, heads, rows = out.shape
    weights = np.empty(lists.shape[3], terms.dtype)
    zero = weights.dtype.type(0)
    for b in range(batch):
        for h in range(heads):
            i, k = h * lists.shape[1] // heads, h * chosen.shape[1] // heads
            for q in range(rows):
                index, count, first, top = lists[b, i, q], counts[b, i, q], chosen[b, k, q], highest[b, h, q]
                row, whole = terms[b, h, q], zero
                for t in range(count):
                    weights[t] = row[np.uint32(index[t])]
                for t in range(count):
                    whole += weights[t]
                if whole < LEAST_SHARED_MASS and count:
                    logits, whole = scores[b, h, q], zero
                    top = logits[index[0]]
                    for t in range(count):
                        top = max(top, logits[index[t]])
                    for t in range(count):
                        weights[t] = np.exp(logits[index[t]] - top)
                        whole += weights[t]
                samples, left = max(count - first, 1), lengths[b, q] - count
                mean = squares = fourths = np.float64(0)
                for t in range(first, count):
                    mean += weights[t]
                mean /= samples
                for t in range(first, count):
                    square = (weights[t] - mean) ** 2
                    squares += square
                    fourths += square * square
                variance = squares / max(samples - 1, 1)
                variance += np.sqrt(max(fourths / samples - variance * variance, 0.0) / samples)
                out[0, b, h, q] = np.sqrt(variance)
                out[1, b, h, q] = whole + mean * left + np.exp(min(sinks[h] - np.float64(top), 80.0))
                out[2, b, h, q] = left
                out[3, b, h, q] = count - first
