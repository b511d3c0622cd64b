"""Intervals and paired tests against known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmark.stats import bootstrap_interval, compare_paired, mean, sign_test


def test_mean_of_nothing_is_missing() -> None:
    assert mean([]) is None and mean([0.5, 1.0]) == 0.75


def test_interval_agrees_with_the_normal_one_for_many_samples() -> None:
    values = np.random.default_rng(1).random(2000).tolist()
    interval = bootstrap_interval(values)
    assert interval is not None
    half = 1.96 * np.std(values) / np.sqrt(len(values))
    assert interval[0] == pytest.approx(np.mean(values) - half, abs=half * 0.15)
    assert interval[1] == pytest.approx(np.mean(values) + half, abs=half * 0.15)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = bootstrap_interval(generator.normal(0.5, 0.1, 60).tolist(), resamples=400)  # type: ignore[misc]
        inside += low <= 0.5 <= high
    assert 0.89 <= inside / 200 <= 0.99


def test_interval_is_a_function_of_the_values_and_the_seed() -> None:
    values = [0.0, 1.0, 1.0, 0.25, 0.5]
    assert bootstrap_interval(values) == bootstrap_interval(values[::-1])
    many = np.random.default_rng(0).random(50).tolist()
    assert bootstrap_interval(many, seed=1) != bootstrap_interval(many, seed=2)
    assert bootstrap_interval([1.0, 1.0, 1.0]) == (1.0, 1.0)
    assert bootstrap_interval([1.0]) is None and bootstrap_interval([]) is None


def test_interval_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([0.5, float("nan")])
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval([0.5, 1.0], level=95)


@pytest.mark.parametrize(("better", "worse"), [(8, 1), (1, 8), (5, 5), (0, 6), (30, 12)])
def test_sign_test_is_the_binomial_test(better: int, worse: int) -> None:
    expected = stats.binomtest(better, better + worse).pvalue
    assert sign_test(better, worse) == pytest.approx(expected)


def test_sign_test_without_differences_says_nothing() -> None:
    assert sign_test(0, 0) is None


def test_paired_difference_uses_the_shared_samples_only() -> None:
    found = compare_paired({"a": 1.0, "b": 0.0, "c": 0.5, "x": 0.0}, {"c": 0.5, "b": 1.0, "a": 0.5, "y": 1.0})
    assert found is not None
    assert found.n == 3 and found.better == 1 and found.worse == 1
    assert found.difference == pytest.approx(-0.5 / 3)
    assert found.interval is not None and found.interval[0] <= found.difference <= found.interval[1]
    assert compare_paired({"a": 1.0}, {"b": 1.0}) is None


def test_pairing_sees_what_unpaired_scores_hide() -> None:
    generator = np.random.default_rng(3)
    base = {str(i): float(v) for i, v in enumerate(generator.random(100))}
    shifted = {key: value - 0.02 for key, value in base.items()}
    found = compare_paired(shifted, base)
    assert found is not None and found.interval is not None
    assert found.interval[1] < 0 and found.p_value is not None and found.p_value < 1e-6
