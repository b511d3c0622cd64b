"""How sure a score is: intervals that hold for any number of samples, and paired comparisons on the same samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from benchmark.storage.benchmark_records import Difference

LEVEL = 0.95
#: A difference is called real if its p-value, too, is at most this.
SIGNIFICANT = 0.05
#: Random orders of the values that a bet goes through, so that its interval does not depend on the given order.
_ORDERS = 16
#: The largest share of the stake in one bet.
_LARGEST_BET = 0.75
#: Steps of the bisection for each end: it ends within 0.0001.
_HALVINGS = 14


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def mean_interval(values: Sequence[float], low: float = 0.0, high: float = 1.0, level: float = LEVEL) -> tuple[float, float]:
    """Confidence interval of the mean of the distribution that these values in [low, high] are a sample of.

    It covers the mean with a probability of at least `level`, whatever the distribution and however few the values.
    Two-valued scores: Clopper and Pearson 1934, exact. Others: betting (hedged capital, Waudby-Smith and Ramdas 2023), the mean
    over fixed random orders. ValueError without values, or for values outside [low, high].
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if len(values) == 0:
        raise ValueError("an interval needs a value, got none")
    data = (np.sort(np.asarray(values, dtype=np.float64)) - low) / (high - low)
    if not ((data >= 0) & (data <= 1)).all():
        raise ValueError(f"values must be in [{low:g}, {high:g}], got {min(values)} to {max(values)}")
    n, ones, error = len(data), int((data == 1).sum()), 1 - level
    if ones + int((data == 0).sum()) == n:
        first = 0.0 if ones == 0 else stats.beta.ppf(error / 2, ones, n - ones + 1)
        last = 1.0 if ones == n else stats.beta.ppf(1 - error / 2, ones + 1, n - ones)
    else:
        first, last = _least_mean(data, error / 2), 1 - _least_mean(1 - data[::-1], error / 2)
    return low + (high - low) * float(first), low + (high - low) * float(last)


def _least_mean(data: np.ndarray, error: float) -> float:
    """The smallest mean m that the sorted data in [0, 1] do not refute.

    A gambler bets on every value being above m, with a stake that follows from the values before. If the mean is m (or less)
    her capital grows to 1 / error with a probability of at most `error`; so does the mean capital over several orders.
    """
    n = len(data)
    generator = np.random.default_rng(0)
    orders = np.stack([data[generator.permutation(n)] for _ in range(_ORDERS)])
    seen = np.arange(2, n + 2)
    means = (0.5 + np.cumsum(orders, 1)) / seen
    variances = (0.25 + np.cumsum((orders - means) ** 2, 1)) / seen
    before = np.concatenate([np.full((_ORDERS, 1), 0.25), variances[:, :-1]], 1)
    stakes = np.sqrt(2 * math.log(1 / error) / (n * before))

    def refuted(m: float) -> bool:
        bets = np.minimum(stakes, _LARGEST_BET / m)
        capital = np.cumsum(np.log1p(bets * (orders - m)), 1)
        return bool(np.max(np.logaddexp.reduce(capital, 0)) - math.log(_ORDERS) >= math.log(1 / error))

    first, last = 0.0, 1.0  # smaller means are refuted before larger ones
    for _ in range(_HALVINGS):
        middle = (first + last) / 2
        first, last = (middle, last) if refuted(middle) else (first, middle)
    return first


def group_interval(tasks: Sequence[Sequence[float]], low: float = 0.0, high: float = 1.0) -> tuple[float, float]:
    """Interval of the mean over tasks of their mean score; every task counts alike. tasks: the scores of each.

    0/1 scores of equally many samples: Clopper and Pearson's of all together, which Hoeffding 1956 shows to cover where the
    tasks' means differ, too. Others: `mean_interval` of rounds, each the mean over tasks of a share of their samples.
    """
    counts = {len(values) for values in tasks}
    if len(counts) == 1 and all(value in (low, high) for values in tasks for value in values):
        return mean_interval([value for values in tasks for value in values], low, high)
    mixed = np.random.default_rng(0)  # a round has samples of any part of a task, in whatever order these are given
    rounds = [
        [float(np.mean(part)) for part in np.array_split(mixed.permutation(np.sort(values)), min(counts))] for values in tasks
    ]
    return mean_interval(np.clip(np.mean(rounds, axis=0), low, high).tolist(), low, high)


def sign_test(better: int, worse: int) -> float | None:
    """Two-sided p-value of so many positive and negative differences if both were equally likely; None without any."""
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else None


def compare_paired(
    scores: Mapping[str, float], baseline: Mapping[str, float], *, bounded: bool = True, level: float = LEVEL
) -> Difference | None:
    """Compare two configurations by sample id, on the samples that both have; None if there is none.

    bounded: both are scores in [0, 1]. Otherwise the interval is Student's, which holds for many samples; None for one.
    """
    shared = sorted(scores.keys() & baseline.keys())
    if not shared:
        return None
    differences = [scores[sample] - baseline[sample] for sample in shared]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Difference(
        difference=math.fsum(differences) / len(differences),
        interval=mean_interval(differences, -1.0, level=level) if bounded else _student_interval(differences, level),
        n=len(shared),
        better=better,
        worse=worse,
        p_value=sign_test(better, worse),
    )


def _student_interval(values: list[float], level: float) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    middle = math.fsum(values) / len(values)
    return middle - half, middle + half
