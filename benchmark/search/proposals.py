"""Which configurations a study tries next: a quarter are asked of a two-objective study, the rest of one search a budget.

All of them see every trial. The two-objective study (error and density, Optuna's multi-objective TPE) spreads over the whole
front, most of which lies between the budgets or beyond them. A level's search looks at the front's one place that is used, just
below its budget: one in three of its questions by TPE, two by steps from its best trial (`local_search.py`). What that gives
against a search for each budget alone: `benchmark/speed/search_quality.py`.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmark.search.local_search import LocalSearch
from benchmark.search.space import CombinationSpace
from benchmark.search.trial import Evaluation, Level, magnitude, objective_value

if TYPE_CHECKING:
    import optuna

BATCH = 8
STARTUP = 2 * BATCH
LEVELS_SHARE = 0.75
# Orders of magnitude of error that an order of magnitude of density above a budget counts for.
EXCESS_WEIGHT = 3.0
OVER = 10.0  # orders of magnitude too, more than errors differ by


class Proposals:
    """Seeded. Ask for parameters, tell what they gave, in turn; the same answers lead to the same questions."""

    def __init__(self, space: CombinationSpace, levels: list[Level], *, limit: int, seed: int, objective: str) -> None:
        """limit: trials in all. The first ones are the levels' templates, and random ones."""
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
            self._views = [optuna.create_study(sampler=_level_sampler(seed=seed + 1 + place)) for place in range(len(levels))]
        self._local = LocalSearch(self._distributions, seed=seed)
        for level in levels:
            self._front.enqueue_trial(space.template_values(level.template), skip_if_exists=True)

    def ask(self, count: int) -> list[dict[str, Any]]:
        """Parameters of the next trials; some may have been asked for before. Their figures are told before more are asked."""
        self._asked = []
        for place in range(count):
            study = self._front
            if self._told >= self._startup and place < LEVELS_SHARE * count:
                study = self._of_a_level()
            self._asked.append(study.ask(self._distributions))
        return [dict(candidate.params) for candidate in self._asked]

    def _of_a_level(self) -> optuna.Study:
        """The study of the level whose turn it is, its next question decided where it is a step from the level's best."""
        turn, place = divmod(self._turn, len(self._levels))
        self._turn += 1
        step = self._local.ask(partial(self._usable_value, level=self._levels[place])) if turn % 3 else None
        if step is not None:
            self._views[place].enqueue_trial(step)
        return self._views[place]

    def tell(self, found: list[Evaluation | None]) -> None:
        """What the trials last asked for gave, in their order; None for one that failed."""
        import optuna

        for candidate, figures in zip(self._asked, found, strict=True):
            self._local.tell(candidate.params, figures)
            if figures is None:
                candidate.study.tell(candidate, state=optuna.trial.TrialState.FAIL)
                continue
            values = [self._front_values(figures), *([self._level_value(figures, level)] for level in self._levels)]
            for study, value in zip([self._front, *self._views], values, strict=True):
                if study is candidate.study:
                    study.tell(candidate, value)
                else:
                    study.add_trial(
                        optuna.trial.create_trial(params=candidate.params, distributions=self._distributions, values=value)
                    )
        self._told += len(found)

    @staticmethod
    def _front_values(figures: Evaluation) -> list[float]:
        return [magnitude(figures.error), magnitude(figures.density)]

    def _level_value(self, figures: Evaluation, level: Level) -> float:
        """The error, and what the density has above the budget; where there is no budget, the objective."""
        if level.budget is None:
            return objective_value(self._objective, figures)
        return magnitude(figures.error) + EXCESS_WEIGHT * max(0.0, math.log10(figures.density / level.budget + 1e-6))

    def _usable_value(self, figures: Evaluation, level: Level) -> float:
        """The same, but nothing above the budget is better than what keeps to it: a step starts from, and aims at, a trial
        that the level can use."""
        over = level.budget is not None and figures.density > level.budget
        return self._level_value(figures, level) + OVER * over


def front_sampler(*, seed: int, startup: int) -> optuna.samplers.BaseSampler:
    """What asks the two-objective study's questions."""
    import optuna

    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=startup)


def _level_sampler(*, seed: int) -> optuna.samplers.BaseSampler:
    """What asks by TPE for one level. It sees all levels' trials, of which only few are near its own budget: so it takes the best
    thirtieth for good ones, where Optuna takes a tenth."""
    import optuna

    def best_thirtieth(trials: int) -> int:
        return min(max(3, math.ceil(trials / 30)), 25)

    return optuna.samplers.TPESampler(
        seed=seed, multivariate=True, constant_liar=True, n_startup_trials=0, gamma=best_thirtieth
    )
