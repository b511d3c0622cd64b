"""Scores of keys from their codes."""

from __future__ import annotations

import numpy as np

from .compiled import compiled


@compiled
def sum_codes(table: np.ndarray, codes: np.ndarray, out: np.ndarray) -> None:
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
