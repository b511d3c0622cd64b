"""Intervals and paired tests against known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmark.stats import compare_paired, group_interval, mean, mean_interval, sign_test


def test_mean_of_nothing_is_missing() -> None:
    assert mean([]) is None and mean([0.5, 1.0]) == 0.75


@pytest.mark.parametrize("n", [1, 3, 10, 50, 500])
@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.9, 0.98])
def test_intervals_of_two_valued_scores_cover(n: int, p: float) -> None:
    """The exact probability, over all numbers of right answers."""
    covered = 0.0
    for right in range(n + 1):
        low, high = mean_interval([1.0] * right + [0.0] * (n - right))
        covered += float(stats.binom.pmf(right, n, p)) * (low <= p <= high)
    assert covered >= 0.95


#: Scores in thirds, hardly ever wrong; paired differences; one of a continuum.
OTHERS = {
    "thirds": (lambda chance, n: chance.choice([0, 1 / 3, 2 / 3, 1], n, p=[0.1, 0.2, 0.3, 0.4]), 2 / 3, 0.0),
    "nearly right": (lambda chance, n: chance.choice([0, 1 / 3, 2 / 3, 1], n, p=[0.02, 0.01, 0.02, 0.95]), 29 / 30, 0.0),
    "differences": (lambda chance, n: chance.choice([-1, 0, 1], n, p=[0.1, 0.8, 0.1]), 0.0, -1.0),
    "rare differences": (lambda chance, n: chance.choice([-1, 0, 1], n, p=[0.02, 0.97, 0.01]), -0.01, -1.0),
    "uniform": (lambda chance, n: chance.random(n), 0.5, 0.0),
}


@pytest.mark.parametrize("n", [1, 3, 10, 50, 500])
@pytest.mark.parametrize("name", OTHERS)
def test_intervals_of_other_scores_cover(name: str, n: int) -> None:
    draw, truth, least = OTHERS[name]
    chance, repeats = np.random.default_rng(n), 100 if n == 500 else 300
    inside, wider = 0, []
    for _ in range(repeats):
        values = draw(chance, n)
        low, high = mean_interval(values.tolist(), least)
        inside += low <= truth <= high
        wider.append((high - low) / (2 * 1.96 * values.std() / np.sqrt(n) + 1e-9))
    assert inside / repeats >= 0.94
    if n == 500 and name in ("thirds", "differences", "uniform"):  # where the normal interval covers
        assert np.mean(wider) <= 1.35


def test_intervals_are_functions_of_the_values_alone() -> None:
    values = [0.0, 1.0, 1.0, 0.25, 0.5]
    assert mean_interval(values) == mean_interval(values[::-1]) == mean_interval(values)
    low, high = mean_interval([1.0, 1.0, 1.0])
    assert high == 1.0 and low == pytest.approx(0.025 ** (1 / 3))
    low, high = mean_interval([0.0, 0.0, 0.0], -1.0)
    assert low < -0.3 and high > 0.3, "three equal samples show little"
    assert mean_interval([0.5])[0] < 0.1 and mean_interval([0.5])[1] > 0.9
    narrow, wide = mean_interval(values, level=0.5), mean_interval(values, level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_intervals_refuse_what_they_cannot_mean() -> None:
    for values in ([0.5, float("nan")], [1.5], [-0.1]):
        with pytest.raises(ValueError, match="must be in"):
            mean_interval(values)
    with pytest.raises(ValueError, match="got none"):
        mean_interval([])
    with pytest.raises(ValueError, match="level"):
        mean_interval([0.5, 1.0], level=95)


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
    base = {str(i): float(v) for i, v in enumerate(np.random.default_rng(3).uniform(0.2, 1, 400))}
    found = compare_paired({key: value - 0.15 for key, value in base.items()}, base)
    assert found is not None and found.interval is not None
    assert found.interval[1] < 0 and found.p_value is not None and found.p_value < 1e-6


def test_unbounded_figures_have_students_interval() -> None:
    found = compare_paired({"a": 3.0, "b": 5.0}, {"a": 1.0, "b": 1.0}, bounded=False)
    assert found is not None and found.interval == pytest.approx(stats.t.interval(0.95, 1, 3.0, 1.0))
    alone = compare_paired({"a": 3.0}, {"a": 1.0}, bounded=False)
    assert alone is not None and alone.interval is None


GROUPS = {
    "0/1 scores, equal sizes": ([(0.05, 4), (0.95, 4), (0.5, 4)], False),
    "0/1 scores, other sizes": ([(0.1, 3), (0.9, 8)], False),
    "thirds": ([(0.2, 5), (0.7, 5), (0.9, 5)], True),
}


@pytest.mark.parametrize("case", GROUPS)
def test_intervals_of_a_group_cover_the_mean_over_its_tasks(case: str) -> None:
    tasks, thirds = GROUPS[case]
    chance, inside, repeats = np.random.default_rng(0), 0, 400
    truth = float(np.mean([p for p, _ in tasks]))
    for _ in range(repeats):
        scores = [(chance.binomial(3, p, n) / 3 if thirds else chance.binomial(1, p, n) * 1.0).tolist() for p, n in tasks]
        low, high = group_interval(scores)
        inside += low <= truth <= high
    assert inside / repeats >= 0.94


def test_the_order_of_samples_does_not_move_a_groups_interval() -> None:
    ordered = [[1.0] * 150 + [0.0] * 150, [1.0] * 400 + [0.0] * 100]
    low, high = group_interval(ordered)
    assert low < 0.65 < high and group_interval([values[::-1] for values in ordered]) == (low, high)


def test_a_group_of_right_answers_counts_all_samples() -> None:
    low, high = group_interval([[1.0] * 3] * 13)
    assert high == 1.0 and low == mean_interval([1.0] * 39)[0] > 0.9
    low, high = group_interval([[0.0] * 5, [0.0] * 7], low=-1.0)
    assert low < 0 < high


def test_levels_widen_the_interval_of_a_difference() -> None:
    scores, base = {str(i): float(i % 3 > 0) for i in range(60)}, {str(i): 1.0 for i in range(60)}
    one, many = compare_paired(scores, base), compare_paired(scores, base, level=1 - 0.05 / 20)
    assert one is not None and many is not None and one.interval is not None and many.interval is not None
    assert many.interval[0] < one.interval[0] < one.interval[1] < many.interval[1]
