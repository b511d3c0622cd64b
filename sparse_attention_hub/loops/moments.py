"""What a sample of a row's softmax terms tells of the others."""

import numpy as np

from .attend import LEAST_SHARED_MASS
from .compiled import compiled


@compiled
def estimate_mass(lengths, taken, taken_counts, base, base_counts, scores, terms, highest, sinks, out):
    """Of each row: the terms' standard deviation, estimated from base samples, with one standard error of the variance added;
    the estimated softmax denominator; keys that are neither taken nor sampled; samples. out float64 (4, B, H, Q); the first
    two are relative to one term of the row, whichever.

    lengths (B, Q): allowed keys; taken, base: lists of keys with p = 1; scores, terms, highest: see attend; sinks (H,).
    """
    _, batch, heads, rows = out.shape
    sample = np.empty(base.shape[3], np.float64)
    for b in range(batch):
        for h in range(heads):
            i, k = h * taken.shape[1] // heads, h * base.shape[1] // heads
            for q in range(rows):
                own, drawn, row = taken[b, i, q], base[b, k, q], terms[b, h, q]
                count, drawn_count, top = taken_counts[b, i, q], base_counts[b, k, q], highest[b, h, q]
                known = total = np.float64(0)
                for t in range(count):
                    known += row[np.uint32(own[t])]
                for t in range(drawn_count):
                    sample[t] = row[np.uint32(drawn[t])]
                    total += sample[t]
                if known + total < LEAST_SHARED_MASS:
                    logits = scores[b, h, q]
                    top = logits[drawn[0]] if drawn_count else np.float32(0)
                    for t in range(count):
                        top = max(top, logits[own[t]])
                    for t in range(drawn_count):
                        top = max(top, logits[drawn[t]])
                    known = total = np.float64(0)
                    for t in range(count):
                        known += np.exp(np.float64(logits[own[t]] - top))
                    for t in range(drawn_count):
                        sample[t] = np.exp(np.float64(logits[drawn[t]] - top))
                        total += sample[t]
                samples, left = max(drawn_count, 1), lengths[b, q] - count - drawn_count
                mean, squares, fourths = total / samples, np.float64(0), np.float64(0)
                for t in range(drawn_count):
                    square = (sample[t] - mean) ** 2
                    squares += square
                    fourths += square * square
                variance = squares / max(samples - 1, 1)
                variance += np.sqrt(max(fourths / samples - variance * variance, 0.0) / samples)
                out[0, b, h, q] = np.sqrt(variance)
                out[1, b, h, q] = known + total + mean * left + np.exp(min(np.float64(sinks[h] - top), 80.0))
                out[2, b, h, q] = left
                out[3, b, h, q] = drawn_count
