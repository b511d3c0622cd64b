"""Local steps from the best trial."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from benchmark.search.local_search import LocalSearch, _scaled, _value
from benchmark.storage.search_records import Evaluation

KINDS: dict[str, BaseDistribution] = {
    "log": FloatDistribution(0.005, 0.5, log=True),
    "linear": FloatDistribution(-1.0, 3.0),
    "stepped": FloatDistribution(0.0, 1.0, step=0.25),
    "integer": IntDistribution(2, 9),
    "log integer": IntDistribution(1, 1000, log=True),
    "choice": CategoricalDistribution((0.01, 0.02, 0.05)),
    "names": CategoricalDistribution(("ip", "euclidean")),
    "only one": CategoricalDistribution((7,)),
    "no range": FloatDistribution(2.0, 2.0),
}


def _figures(params: dict[str, Any]) -> Evaluation:
    """The error falls with the sum of two parameters; a third only adds density."""
    total = params["a"] + params["b"]
    return Evaluation(error=math.exp(-8 * total), density=total + 0.1 * params["idle"], seconds=0.0)


SMOOTH = {name: FloatDistribution(0.005, 0.5, log=True) for name in ("a", "b", "idle")}


def _value_at(budget: float) -> Any:
    return lambda figures: math.log10(figures.error) + 3 * max(0.0, math.log10(figures.density / budget))


@pytest.mark.parametrize("budget", [0.05, 0.3])
def test_steps_come_close_to_the_best_a_budget_allows(budget: float) -> None:
    search = LocalSearch(SMOOTH, seed=1)
    value = _value_at(budget)
    for start in (0.01, 0.02, 0.04, 0.08, 0.16):
        params = {"a": start, "b": 0.16 * 0.01 / start, "idle": 0.05}
        search.tell(params, _figures(params))
    best = math.inf
    for _ in range(40):
        params = search.ask(value)
        assert params is not None
        figures = _figures(params)
        search.tell(params, figures)
        if figures.density <= budget:
            best = min(best, figures.error)
    assert best <= math.exp(-8 * (budget - 0.0005)) * 1.02


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 30))
def test_proposals_are_new_and_in_the_space(seed: int, trials: int) -> None:
    search = LocalSearch(KINDS, seed=seed)
    asked = []
    params: dict[str, Any] | None = {name: _value(kind, 0.4) for name, kind in KINDS.items()}
    for turn in range(trials):
        assert params is not None and params not in asked
        assert all(kind._contains(kind.to_internal_repr(params[name])) for name, kind in KINDS.items())
        asked.append(params)
        search.tell(params, Evaluation(error=1 / (turn + 1), density=0.1, seconds=0.0))
        params = search.ask(lambda figures: figures.error)


@given(st.floats(0, 1))
def test_scaling_is_inverted(scaled: float) -> None:
    for kind in KINDS.values():
        value = _value(kind, scaled)
        assert _value(kind, _scaled(kind, value)) == pytest.approx(value)
        assert 0 <= _scaled(kind, value) <= 1


def test_without_a_trial_or_a_new_candidate_there_is_no_proposal() -> None:
    search = LocalSearch({"mode": KINDS["names"]}, seed=0)
    assert search.ask(lambda figures: figures.error) is None
    search.tell({"mode": "ip"}, Evaluation(error=0.1, density=0.1, seconds=0.0))
    assert search.ask(lambda figures: figures.error) == {"mode": "euclidean"}
    assert search.ask(lambda figures: figures.error) is None


def test_a_failed_trial_is_not_proposed_again_and_is_not_fitted() -> None:
    search = LocalSearch({"mode": KINDS["names"]}, seed=0)
    search.tell({"mode": "euclidean"}, None)
    assert search.ask(lambda figures: figures.error) is None
    search.tell({"mode": "ip"}, Evaluation(error=0.1, density=0.1, seconds=0.0))
    assert search.ask(lambda figures: figures.error) is None


def test_the_same_figures_lead_to_the_same_steps() -> None:
    def steps(seed: int) -> list[Any]:
        search = LocalSearch(SMOOTH, seed=seed)
        params: Any = {"a": 0.1, "b": 0.1, "idle": 0.1}
        found = []
        for _ in range(10):
            search.tell(params, _figures(params))
            params = search.ask(_value_at(0.1))
            found.append(params)
        return found

    assert steps(1) == steps(1) != steps(2)
