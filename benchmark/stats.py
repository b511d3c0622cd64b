"""How sure a score is: bootstrap intervals over samples, and paired comparisons on the same samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_BLOCK = 2**22  # numbers drawn at once


@dataclass(frozen=True)
class Comparison:
    """A configuration against a baseline on the samples that both answered.

    difference: mean of (configuration - baseline). interval: its 95% bootstrap interval, None for fewer than two
    samples. better, worse: samples with a positive or negative difference. p_value: two-sided sign test over those,
    None without any.
    """

    difference: float
    interval: tuple[float, float] | None
    n: int
    better: int
    worse: int
    p_value: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def bootstrap_interval(
    values: Sequence[float], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean over samples; None for fewer than two values.

    The same values, in whatever order, and seed give the same interval.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if len(values) < 2:
        return None
    data = np.sort(np.asarray(values, dtype=np.float64))
    if not np.isfinite(data).all():
        raise ValueError("values must be finite: leave failed samples out")
    if data[0] == data[-1]:
        return float(data[0]), float(data[0])
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    at_once = max(1, _BLOCK // len(data))
    for start in range(0, resamples, at_once):
        stop = min(resamples, start + at_once)
        means[start:stop] = data[generator.integers(0, len(data), (stop - start, len(data)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_test(better: int, worse: int) -> float | None:
    """Two-sided p-value of so many positive and negative differences if both were equally likely; None without any."""
    n = better + worse
    if n == 0:
        return None
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1))
    return float(min(1.0, 2 * tail / 2**n))


def compare_paired(
    scores: Mapping[str, float], baseline: Mapping[str, float], *, level: float = LEVEL, seed: int = 0
) -> Comparison | None:
    """Compare two configurations by sample id, on the samples that both have; None if there is none."""
    shared = sorted(scores.keys() & baseline.keys())
    if not shared:
        return None
    differences = [scores[sample] - baseline[sample] for sample in shared]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Comparison(
        difference=math.fsum(differences) / len(differences),
        interval=bootstrap_interval(differences, level=level, seed=seed),
        n=len(shared),
        better=better,
        worse=worse,
        p_value=sign_test(better, worse),
    )
