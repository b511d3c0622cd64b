"""Which configurations a study tries next: a quarter come from a two-objective search, the others from one search per level.

Each search sees every trial. The two-objective search (error and density, Optuna's multi-objective TPE) covers the whole
Pareto front, most of which is between the budgets or outside them. A level's search covers the part just below its budget:
one in three of its proposals comes from TPE, two are steps from its best trial (`local_search.py`).
`benchmark/speed/search_quality.py` compares this with one separate search per budget.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import TYPE_CHECKING

from benchmark.search.local_search import LocalSearch
from benchmark.search.space import CombinationSpace
from benchmark.search.trial import Level, magnitude, objective_value
from benchmark.storage.records import Params
from benchmark.storage.search_records import Evaluation

if TYPE_CHECKING:
    import optuna

BATCH = 8
STARTUP = 2 * BATCH
LEVELS_SHARE = 0.75
# Exceeding a budget by one order of magnitude of density counts as much as this many orders of magnitude of error.
EXCESS_WEIGHT = 3.0
OVER = 10.0  # penalty in orders of magnitude, larger than any difference between errors


class Proposals:
    """Call `ask` and `tell` in turn. Seeded: the same figures lead to the same proposals."""

    def __init__(self, space: CombinationSpace, levels: list[Level], *, limit: int, seed: int, objective: str) -> None:
        """limit: how many trials there will be. The first ones are the levels' templates, then random ones."""
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._distributions = OptunaSearch.convert_search_space(space.ray_space())
        self._levels, self._objective = levels, objective
        self._startup = min(STARTUP, max(4, limit // 4))
        self._turn = self._told = 0
        self._asked: list[optuna.trial.Trial] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna marks multivariate sampling and constant liars as experimental
            self._front = optuna.create_study(
                directions=["minimize", "minimize"], sampler=front_sampler(seed=seed, startup=self._startup)
            )
            self._by_level = [optuna.create_study(sampler=_level_sampler(seed=seed + 1 + n)) for n in range(len(levels))]
        self._local = LocalSearch(self._distributions, seed=seed)
        for level in levels:
            self._front.enqueue_trial(space.template_values(level.template), skip_if_exists=True)

    def ask(self, count: int) -> list[Params]:
        """Parameters of the next trials; some may repeat earlier ones. Call `tell` with their figures before the next `ask`."""
        self._asked = []
        for number in range(count):
            study = self._front
            if self._told >= self._startup and number < LEVELS_SHARE * count:
                study = self._next_level()
            self._asked.append(study.ask(self._distributions))
        return [dict(candidate.params) for candidate in self._asked]

    def _next_level(self) -> optuna.Study:
        """The Optuna study of the level whose turn it is; where its proposal is a local step, that step is enqueued in it."""
        turn, index = divmod(self._turn, len(self._levels))
        self._turn += 1
        step = self._local.ask(partial(self._usable_value, level=self._levels[index])) if turn % 3 else None
        if step is not None:
            self._by_level[index].enqueue_trial(step)
        return self._by_level[index]

    def tell(self, found: list[Evaluation | None]) -> None:
        """Figures of the trials of the last `ask`, in its order; None for a failed trial."""
        import optuna

        for candidate, figures in zip(self._asked, found, strict=True):
            self._local.tell(candidate.params, figures)
            if figures is None:
                candidate.study.tell(candidate, state=optuna.trial.TrialState.FAIL)
                continue
            front = [magnitude(figures.error), magnitude(figures.density)]
            values = [front, *([self._level_value(figures, level)] for level in self._levels)]
            for study, value in zip([self._front, *self._by_level], values, strict=True):
                if study is candidate.study:
                    study.tell(candidate, value)
                else:
                    study.add_trial(
                        optuna.trial.create_trial(params=candidate.params, distributions=self._distributions, values=value)
                    )
        self._told += len(found)

    def _level_value(self, figures: Evaluation, level: Level) -> float:
        """The error plus a penalty for density above the budget; the objective for a level without a budget."""
        if level.budget is None:
            return objective_value(self._objective, figures.error, figures.density)
        return magnitude(figures.error) + EXCESS_WEIGHT * max(0.0, math.log10(figures.density / level.budget + 1e-6))

    def _usable_value(self, figures: Evaluation, level: Level) -> float:
        """The same, but any trial within the budget is better than any above it: local steps start from, and aim at, trials
        that the level can use."""
        over = level.budget is not None and figures.density > level.budget
        return self._level_value(figures, level) + OVER * over


def front_sampler(*, seed: int, startup: int) -> optuna.samplers.BaseSampler:
    """The sampler of the two-objective study."""
    import optuna

    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=startup)


def _level_sampler(*, seed: int) -> optuna.samplers.BaseSampler:
    """The TPE sampler of one level. Few of the trials are near its budget, so it counts the best thirtieth of them as good,
    where Optuna's default is a tenth."""
    import optuna

    def best_thirtieth(trials: int) -> int:
        return min(max(3, math.ceil(trials / 30)), 25)

    return optuna.samplers.TPESampler(
        seed=seed, multivariate=True, constant_liar=True, n_startup_trials=0, gamma=best_thirtieth
    )
