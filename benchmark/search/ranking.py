"""Which trials of a study are promoted, confirmed and chosen, for each of its budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmark.search.trial import Level, objective_value
from benchmark.stats import sign_test
from benchmark.storage.records import BudgetOn
from benchmark.storage.search_records import Best, Evaluation, Trial

SLACK = 1.05
MARGIN = 0.995
ERROR_SLACK = 1.2
CLEARLY = 1.1  # replay cannot rank two configurations whose errors differ by a smaller ratio
SIGNIFICANT = 0.05
#: Nats per token by which head budgets may make the dense answers less likely than even budgets do: less is rounding.
LESS_LIKELY = 0.01


class Ranking:
    """objective: what levels without a budget minimise. budget_on: what budgets limit, the density or the KV bytes."""

    def __init__(self, levels: list[Level], objective: str, budget_on: BudgetOn) -> None:
        self.levels, self.objective, self.budget_on = levels, objective, budget_on

    def spent(self, figures: Evaluation) -> float:
        """What a budget limits."""
        return figures.spent(self.budget_on)

    def fits(self, figures: Evaluation, level: Level) -> bool:
        return _within(self.spent(figures), level)

    def value(self, figures: Evaluation, level: Level) -> float:
        """The value minimised at a level: the error under a budget, the objective without one."""
        if level.budget is None:
            return objective_value(self.objective, figures.error, self.spent(figures))
        return error_of(figures)

    def moves_front(self, trial: Trial, before: Sequence[Trial]) -> bool:
        """Whether no earlier trial has both an error and a spending within 1% of this one's or below."""
        if 0 not in trial.rungs:
            return False
        error, spent = error_of(trial.rungs[0]), self.spent(trial.rungs[0])
        earlier = [other.rungs[0] for other in before if 0 in other.rungs]
        return not any(error_of(e) <= 1.01 * error and self.spent(e) <= 1.01 * spent for e in earlier)

    def promote(self, trials: Sequence[Trial], rung: int, limit: int) -> list[Trial]:
        """Trials near the best of some level: spent at most 1.05 x its budget, error at most 1.2 x its best error. The best of
        each level first, then the second best of each, up to `limit`."""
        queues = []
        for level in self.levels:
            near = self.ordered(trials, rung, level)
            if not near:
                # No configuration meets this budget: the closest one is confirmed, and reported with meets_budget false.
                near = sorted(trials, key=lambda t: (self.spent(t.rungs[rung]), t.number))[:1]
            best = error_of(near[0].rungs[rung]) if near else 0.0
            queues.append([t for t in near if error_of(t.rungs[rung]) <= ERROR_SLACK * best or level.budget is None])
        chosen: list[Trial] = []
        while len(chosen) < limit and any(queues):
            for queue in queues:
                while queue and queue[0] in chosen:
                    queue.pop(0)
                if queue and len(chosen) < limit:
                    chosen.append(queue.pop(0))
        return chosen

    def ordered(self, trials: Sequence[Trial], rung: int, level: Level) -> list[Trial]:
        """Trials that spend at most 1.05 x the budget of a level on a rung, best first.

        Trials within the budget precede those slightly above it, which a higher rung may find to fit: otherwise all finalists
        of a level could end slightly above its budget.
        """
        budget = level.budget or 1.0
        near = [t for t in trials if self.spent(t.rungs[rung]) <= SLACK * budget]
        return sorted(
            near,
            key=lambda t: (self.spent(t.rungs[rung]) > MARGIN * budget, self.value(t.rungs[rung], level), t.number),
        )

    def refills(self, trials: Sequence[Trial]) -> list[Trial]:
        """For each level whose confirmed trials are clearly worse than one that is expected to fit: that one."""
        chosen: list[Trial] = []
        for level in self.levels:
            confirmed = [t for t in alive(_likely(trials), 3) if self.fits(t.last, level)]
            better: list[tuple[int, float, int]] = []
            for trial in alive(trials, 0):
                rung = min(1, trial.reached or 0)
                value = self.value(trial.rungs[rung], level)
                confirmed_value = min((self.value(t.rungs[rung], level) for t in confirmed), default=math.inf)
                expected = _within(self._expected(trial, trials), level)
                if 2 not in trial.rungs and expected and CLEARLY * value < confirmed_value:
                    better.append((-rung, value, trial.number))
            if better and (best := trials[min(better)[2]]) not in chosen:
                chosen.append(best)
        return chosen

    def _expected(self, trial: Trial, trials: Sequence[Trial]) -> float:
        """What a forced forward would find spent: the replayed value times the largest increase measured so far."""
        if 2 in trial.rungs:
            return self.spent(trial.last)
        rung = min(1, trial.reached or 0)
        added = max((self.spent(t.rungs[2]) / self.spent(t.rungs[rung]) for t in alive(trials, 2)), default=1.0)
        return self.spent(trial.last) * max(1.0, added)

    def best(self, trials: Sequence[Trial]) -> list[Best]:
        """The best of each level: the smallest confirmed error within the budget, among finalists whose score is not
        significantly worse than the best finalist's on the same samples. Where no confirmed trial fits, the smallest error
        among trials that fit on their highest rung, those that a forced forward is expected to keep within the budget first.
        A level without an evaluated trial is left out, and so are head budgets that make the dense answers less likely."""
        found: list[Best] = []
        likely = _likely(trials)
        measured = alive(likely, 0)
        for level in self.levels if measured else []:
            fits = [t for t in measured if self.fits(t.last, level)]
            if fits:
                candidates = _not_worse([t for t in fits if 3 in t.rungs]) or fits
                expected = {t.number: _within(self._expected(t, trials), level) for t in candidates}
                chosen = min(candidates, key=lambda t: (not expected[t.number], self.value(t.last, level), t.number))
            else:
                chosen = min(alive(likely, 3) or measured, key=lambda t: (self.spent(t.last), t.number))
            confirmed = 3 in chosen.rungs
            found.append(
                Best(level=level.name, budget=level.budget, trial=chosen.number, meets_budget=bool(fits), confirmed=confirmed)
            )
        return found


def alive(trials: Sequence[Trial], rung: int) -> list[Trial]:
    """Trials that a rung measured and that have not failed since."""
    return [trial for trial in trials if trial.status == "completed" and rung in trial.rungs]


def error_of(figures: Evaluation) -> float:
    """The error on a rung that measures it."""
    assert figures.error is not None
    return figures.error


def _likely(trials: Sequence[Trial]) -> list[Trial]:
    """The trials with even budgets, and those with head budgets that leave the dense answers as likely as the even ones that they
    scale do, by a forced forward of both."""
    nll = {trial.number: trial.rungs[2].reference_nll for trial in trials if 2 in trial.rungs}

    def keeps(trial: Trial) -> bool:
        if trial.table is None:
            return True
        own, even = nll.get(trial.number), nll.get(trial.table.base)
        return own is not None and even is not None and own <= even + LESS_LIKELY

    return [trial for trial in trials if keeps(trial)]


def _not_worse(trials: list[Trial]) -> list[Trial]:
    """Confirmed trials whose sample scores are not significantly below the best-scoring trial's (sign test on the same samples);
    all where a score is missing."""
    scores = [t.rungs[3].sample_scores for t in trials]
    if not trials or None in scores:
        return trials
    leader = max(trials, key=lambda t: (t.rungs[3].score or 0.0, -error_of(t.last)))
    kept = []
    for trial, own in zip(trials, scores, strict=True):
        pairs = list(zip(own or [], leader.rungs[3].sample_scores or [], strict=True))
        worse, better = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
        if worse <= better or (sign_test(better, worse) or 0.0) >= SIGNIFICANT:
            kept.append(trial)
    return kept


def _within(spent: float, level: Level) -> bool:
    return level.budget is None or spent <= level.budget
