"""Proposals of a study."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmark.search.proposals import BATCH, STARTUP, Proposals
from benchmark.search.space import CombinationSpace
from benchmark.search.trial import Level
from benchmark.speed.search_setup import template
from benchmark.storage.search_records import Evaluation

BUDGETS = (0.05, 0.1, 0.25, 0.5)


def _levels(budgets: tuple[float, ...] = BUDGETS) -> list[Level]:
    return [Level(f"{100 * budget:g}pct", budget, template("oracle_top_k", budget)) for budget in budgets]


def _figures(params: dict[str, Any]) -> Evaluation:
    """Only the top-k lowers the error; the local window only adds density."""
    sink, window, heavy = (
        params[name] for name in ("sinkmasker_sink_size", "localmasker_window_size", "oracletopk_heavy_size")
    )
    return Evaluation(error=math.exp(-20 * heavy), density=min(1.0, sink + window + heavy), seconds=0.0)


def _run(levels: list[Level], trials: int, seed: int = 0, **options: Any) -> list[dict[str, Any]]:
    space = CombinationSpace(levels[0].template, "task")
    proposals = Proposals(space, levels, limit=trials, seed=seed, objective=options.pop("objective", "default"))
    asked: list[dict[str, Any]] = []
    while len(asked) < trials:
        batch = proposals.ask(BATCH)
        proposals.tell([options.get("failing", lambda _: False)(p) and None or _figures(p) for p in batch])
        asked += batch
    return asked


def test_starts_from_every_levels_template() -> None:
    levels = _levels()
    space = CombinationSpace(levels[0].template, "task")
    assert _run(levels, 8)[:4] == [space.template_values(level.template) for level in levels]


def test_the_same_figures_lead_to_the_same_proposals() -> None:
    assert _run(_levels(), 40, seed=3) == _run(_levels(), 40, seed=3)
    assert _run(_levels(), 40, seed=3) != _run(_levels(), 40, seed=4)


@pytest.mark.parametrize("budget", BUDGETS)
def test_most_trials_gather_below_the_budgets(budget: float) -> None:
    """The optimum spends the whole budget, apart from the smallest sink and window, on the top-k: each level comes close."""
    found = [_figures(params) for params in _run(_levels(), 160)]
    best = min(figures.error for figures in found if figures.density <= budget)
    assert best <= math.exp(-20 * (budget - 0.003)) * 1.25
    later = found[len(found) // 2 :]
    near = sum(any(0.7 * b <= figures.density <= 1.1 * b for b in BUDGETS) for figures in later)
    assert near >= 0.7 * len(later)


def test_failed_trials_do_not_stop_the_search() -> None:
    failing = {"failing": lambda params: params["localmasker_window_size"] > 0.05}
    assert len(_run(_levels(), STARTUP + 3 * BATCH, **failing)) == STARTUP + 3 * BATCH


def test_without_a_budget_the_objective_is_searched() -> None:
    """ "sparsity_10" penalises density above a tenth: the best trial is just below it."""
    level = Level("none", None, template("oracle_top_k", 0.5))
    found = [_figures(params) for params in _run([level], 80, objective="sparsity_10")]
    best = min(figures.error for figures in found if figures.density <= 0.105)
    assert best <= math.exp(-20 * 0.08)
