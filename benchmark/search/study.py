"""One study: the search for one (model, task, masker combination), for all its budgets at once. No Ray, no model in here.

The ladder: every configuration is replayed on a few rows and layers (rung 0); the best go on to the full replay (1); at most
six finalists are confirmed by a forced forward (2) and by real generation with the task's own score (3).

A forced forward may measure more density than the replay did, and a level lose its finalists. So while a level's confirmed
configurations that fit are clearly worse, as replayed, than one that is expected to fit (its density times the most that a
forced forward has added so far), that one is confirmed too: at most three more a level. What fits a level only as replayed is
its best where nothing confirmed fits.

A study asks seeded Optuna studies for configurations (`proposals.py`) and looks each up in a journal before evaluating it,
so one that was killed goes on where it was by simply running again: what was journalled is not evaluated twice, and the
outcome is the same.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from benchmark.search.proposals import BATCH, Proposals
from benchmark.search.space import CombinationSpace
from benchmark.search.trial import RUNGS, Best, Evaluation, Evaluator, Level, Trial, TrialTimeout, finite, objective_value
from benchmark.stats import sign_test
from benchmark.storage.results import Journal
from benchmark.workers.errors import BrokenDeviceError, check_device, is_passing
from sparse_attention_hub import ResearchAttentionConfig
from sparse_attention_hub.errors import UserError

MAX_FINALISTS = 6
PROMOTED_SHARE = 0.1
DENSITY_SLACK = 1.05
DENSITY_MARGIN = 0.995
ERROR_SLACK = 1.2
CLEARLY = 1.1  # the ratio of errors below which replay does not tell two configurations apart
MAX_REFILLS = 3
MAX_DUPLICATES = 24
SIGNIFICANT = 0.05

_Record = tuple[Trial, int, dict[str, Any]]  # a trial, a rung, and what is journalled of its evaluation


class Study:
    """Runs step by step: `for progress in study.run()`. Afterwards `trials` and `best()`."""

    def __init__(
        self,
        space: CombinationSpace,
        levels: list[Level],
        evaluator: Evaluator,
        journal: Journal,
        *,
        num_samples: int,
        timeout: float,
        seed: int,
        objective: str = "default",
    ) -> None:
        self.space, self.levels, self.evaluator, self.journal = space, levels, evaluator, journal
        self.num_samples, self.timeout, self.seed, self.objective = num_samples, timeout, seed, objective
        self.trials: list[Trial] = []
        self.evaluated = 0  # not counting what the journal held
        self.known_trials, self.known_seconds = 0, 0.0  # in the journal already, and what these evaluations took then
        self._known: dict[str, dict[str, Any]] = {}
        self._passed: set[str] = set()  # failed by such a fault before
        self._broke: set[str] = set()  # were in work, with others, when a device broke
        self._broke_alone: set[str] = set()

    def run(self) -> Iterator[dict[str, Any]]:
        """Search, climb, confirm. Yields progress after every step; each step's figures are journalled before."""
        self._read_journal()
        if self.space.domains:
            yield from self._search()
        else:
            self._run_batch([self._new_trial({})], 0)
            yield self.progress("search")
        yield from self._climb()

    def _read_journal(self) -> None:
        """What ran out of time under another limit, or failed once by a fault that may have passed, is tried again."""
        for line in self.journal.read():
            for record in line.get("evaluations", []):
                if record["passing"]:
                    self._passed.add(record["key"])
                elif record["limit"] in (None, self.timeout):
                    self._known[record["key"]] = record
            broke = line.get("broke", [])
            (self._broke_alone if len(broke) == 1 else self._broke).update(broke)

    # -- rung 0 ------------------------------------------------------------------------------------------------------

    def _search(self) -> Iterator[dict[str, Any]]:
        limit = len(self.levels) * self.num_samples
        proposals = Proposals(self.space, self.levels, limit=limit, seed=self.seed, objective=self.objective)
        seen: dict[str, Trial] = {}
        duplicates = since_moved = 0
        while len(self.trials) < limit and duplicates < MAX_DUPLICATES and since_moved < self.num_samples:
            asked = proposals.ask(min(BATCH, limit - len(self.trials)))
            before, fresh = list(self.trials), []
            for params in asked:
                name = _canonical(params)
                duplicates = duplicates + 1 if name in seen else 0
                if name not in seen:
                    seen[name] = self._new_trial(params)
                    fresh.append(seen[name])
            self._run_batch(fresh, 0)
            told = [seen[_canonical(params)] for params in asked]
            proposals.tell([trial.rungs[0] if trial.status == "completed" else None for trial in told])
            moved = any(_moves_front(trial, before) for trial in fresh)
            since_moved = 0 if moved else since_moved + len(asked)
            yield self.progress("search")

    def _new_trial(self, params: dict[str, Any]) -> Trial:
        trial = Trial(len(self.trials), params)
        self.trials.append(trial)
        return trial

    # -- the higher rungs --------------------------------------------------------------------------------------------

    def _climb(self) -> Iterator[dict[str, Any]]:
        rung0 = self._alive(0)
        limit = max(MAX_FINALISTS, math.ceil(PROMOTED_SHARE * len(rung0)))
        promoted = self._promote(rung0, 0, limit)
        yield from self._ascend(promoted, (1,))
        finalists = self._promote([t for t in promoted if t.status == "completed"], 1, MAX_FINALISTS)
        yield from self._ascend(finalists, (2, 3))
        for _ in range(MAX_REFILLS):
            yield from self._ascend(self._refills(), (1, 2, 3))
        for trial in self.trials:
            if trial.status == "completed" and trial.reached is not None and trial.reached < len(RUNGS) - 1:
                trial.pruned_at = trial.reached

    def _ascend(self, trials: list[Trial], rungs: tuple[int, ...]) -> Iterator[dict[str, Any]]:
        for rung in rungs:
            waiting = [t for t in trials if t.status == "completed" and rung not in t.rungs]
            for start in range(0, len(waiting), BATCH):
                self._run_batch(waiting[start : start + BATCH], rung)
                yield self.progress(RUNGS[rung])

    def _refills(self) -> list[Trial]:
        """One more to confirm for each level whose confirmed ones are clearly worse than one that is expected to fit."""
        chosen: list[Trial] = []
        for level in self.levels:
            confirmed = [t for t in self._alive(3) if _fits(t.last.density, level)]
            better: list[tuple[int, float, int]] = []
            for trial in self._alive(0):
                rung = min(1, trial.reached or 0)
                value = self._value(trial.rungs[rung], level)
                held = min((self._value(t.rungs[rung], level) for t in confirmed), default=math.inf)
                if 2 not in trial.rungs and _fits(self._expected_density(trial), level) and CLEARLY * value < held:
                    better.append((-rung, value, trial.number))
            if better and (best := self.trials[min(better)[2]]) not in chosen:
                chosen.append(best)
        return chosen

    def _expected_density(self, trial: Trial) -> float:
        """What a forced forward would measure: the replayed density times the most that one added to another trial's."""
        if 2 in trial.rungs:
            return trial.last.density
        rung = min(1, trial.reached or 0)
        added = max((t.rungs[2].density / t.rungs[rung].density for t in self._alive(2)), default=1.0)
        return trial.last.density * max(1.0, added)

    def _alive(self, rung: int) -> list[Trial]:
        return [trial for trial in self.trials if trial.status == "completed" and rung in trial.rungs]

    def _promote(self, trials: list[Trial], rung: int, limit: int) -> list[Trial]:
        """Those near the best of some level: density at most 1.05 L, error at most 1.2 x that level's best. The best of
        each level first, then the second best of each, up to `limit`.

        Those that keep within the budget go before those that pass it a little, which a higher rung may find to fit: else
        all finalists of a level could end a hair above it.
        """
        queues: list[list[Trial]] = []
        for level in self.levels:
            budget = level.budget or 1.0
            near = [t for t in trials if t.rungs[rung].density <= DENSITY_SLACK * budget]
            near.sort(
                key=lambda t: (t.rungs[rung].density > DENSITY_MARGIN * budget, self._value(t.rungs[rung], level), t.number)
            )
            if not near:
                # No configuration meets this budget: the closest one is confirmed and reported as such.
                near = sorted(trials, key=lambda t: (t.rungs[rung].density, t.number))[:1]
            best = near[0].rungs[rung].error if near else 0.0
            queues.append([t for t in near if t.rungs[rung].error <= ERROR_SLACK * best or level.budget is None])
        chosen: list[Trial] = []
        while len(chosen) < limit and any(queues):
            for queue in queues:
                while queue and queue[0] in chosen:
                    queue.pop(0)
                if queue and len(chosen) < limit:
                    chosen.append(queue.pop(0))
        return chosen

    # -- evaluating --------------------------------------------------------------------------------------------------

    def _run_batch(self, trials: list[Trial], rung: int) -> None:
        """Evaluate trials on a rung: from the journal where it knows them, the rest in one pass. Where that pass fails, one
        by one, so that only the culprit fails."""
        waiting: list[tuple[Trial, ResearchAttentionConfig]] = []
        for trial in trials:
            record = self._known.get(self._journal_key(trial, rung))
            if record is not None:
                self._settle(trial, rung, record)
                self.known_trials += rung == 0
                self.known_seconds += trial.rungs[rung].seconds if rung in trial.rungs else 0.0
                continue
            if trial.seconds >= self.timeout:
                self._fail(trial, rung, TrialTimeout())
                continue
            if self._journal_key(trial, rung) in self._broke_alone:
                message = "ended its worker, alone and with others: a fault of its device"
                self._write([self._record(trial, rung, status="failed", error_message=message)])
                continue
            try:
                waiting.append((trial, self.space.build(trial.params)))
            except ValueError as error:
                self._write([self._record(trial, rung, status="failed", error_message=str(error))])
        if not waiting:
            return
        if len(waiting) > 1 and any(self._journal_key(trial, rung) in self._broke for trial, _ in waiting):
            for trial, _ in waiting:
                self._run_batch([trial], rung)
            return
        left = sum(self.timeout - trial.seconds for trial, _ in waiting)
        try:
            results = self.evaluator.evaluate([config for _, config in waiting], rung, left / len(waiting))
        except Exception as error:
            try:
                check_device(error)
            except BrokenDeviceError:
                self.journal.append({"broke": [self._journal_key(trial, rung) for trial, _ in waiting]})
                raise
            if len(waiting) == 1:
                self._fail(waiting[0][0], rung, error)
            else:
                for trial, _ in waiting:
                    self._run_batch([trial], rung)
            return
        # One line of the journal: a batch that was evaluated in lockstep is not split by a restart.
        self._write(
            [
                self._late(trial, rung)
                if trial.seconds + evaluation.seconds > self.timeout
                else self._record(trial, rung, evaluation=evaluation)
                for (trial, _), evaluation in zip(waiting, results, strict=True)
            ]
        )

    def _fail(self, trial: Trial, rung: int, error: Exception) -> None:
        """Record a failure. Bad input is no configuration's fault and is raised."""
        if isinstance(error, UserError):
            raise error
        if isinstance(error, TrialTimeout):
            self._write([self._late(trial, rung)])
            return
        message = f"{type(error).__name__}: {error}"
        passing = is_passing(error) and self._journal_key(trial, rung) not in self._passed
        self._write([self._record(trial, rung, status="failed", error_message=message, passing=passing)])

    def _late(self, trial: Trial, rung: int) -> _Record:
        late = f"took longer than {self.timeout:g} s over its rungs (--search-timeout), before the end of {RUNGS[rung]}"
        message = f"{late}: raise it, or lower --search-max-requests"
        return self._record(trial, rung, status="timeout", error_message=message)

    def _record(
        self,
        trial: Trial,
        rung: int,
        evaluation: Evaluation | None = None,
        status: str = "completed",
        error_message: str | None = None,
        passing: bool = False,
    ) -> _Record:
        """What is journalled of an evaluation. passing: the failure may not come again."""
        if evaluation is not None and not finite(evaluation):
            evaluation, status, error_message = None, "failed", f"not a number on rung {rung} ({RUNGS[rung]})"
        record = {
            "key": self._journal_key(trial, rung),
            "params": trial.params,
            "rung": rung,
            "status": status,
            "error_message": error_message,
            "evaluation": None if evaluation is None else asdict(evaluation),
            "limit": self.timeout if status == "timeout" else None,
            "passing": passing,
            "time": time.time(),
        }
        return trial, rung, record

    def _write(self, records: list[_Record]) -> None:
        self.journal.append({"evaluations": [record for _, _, record in records]})
        self.evaluated += len(records)
        for trial, rung, record in records:
            self._settle(trial, rung, record)

    def _settle(self, trial: Trial, rung: int, record: dict[str, Any]) -> None:
        trial.status, trial.error_message, trial.finished = record["status"], record["error_message"], record["time"]
        trial.passing = record["passing"]
        if record["evaluation"] is not None:
            trial.rungs[rung] = Evaluation(**record["evaluation"])

    def _journal_key(self, trial: Trial, rung: int) -> str:
        return json.dumps([_canonical(trial.params), rung, self.evaluator.key])

    # -- choosing ----------------------------------------------------------------------------------------------------

    def _value(self, figures: Evaluation, level: Level) -> float:
        """What is minimised at a level: the error within a budget, the objective without one."""
        return figures.error if level.budget is not None else objective_value(self.objective, figures)

    def best(self) -> list[Best]:
        """The best of each level: the smallest confirmed error within the budget, among finalists whose score is not
        significantly worse than the best finalist's on the same samples. Where nothing confirmed fits, the smallest error of
        what fits on its highest rung, what a forced forward is expected to keep within the budget before the rest. A level
        without any evaluated trial is left out."""
        found: list[Best] = []
        measured = self._alive(0)
        for level in self.levels if measured else []:
            fits = [t for t in measured if _fits(t.last.density, level)]
            confirmed = [t for t in fits if 3 in t.rungs]
            if fits:
                _, _, number = min(
                    (not _fits(self._expected_density(t), level), self._value(t.last, level), t.number)
                    for t in _not_worse(confirmed) or fits
                )
            else:
                _, number = min((t.last.density, t.number) for t in self._alive(3) or measured)
            found.append(Best(level.name, level.budget, number, bool(fits), 3 in self.trials[number].rungs))
        return found

    def progress(self, stage: str) -> dict[str, Any]:
        """Where the study stands: counts, and the smallest error so far at each level."""
        best: dict[str, float | None] = {}
        for level in self.levels:
            fits = [t.last.error for t in self._alive(0) if t.last.density <= (level.budget or 1.0)]
            best[level.name] = min(fits, default=None)
        rungs = [sum(rung in trial.rungs for trial in self.trials) for rung in range(len(RUNGS))]
        failed = sum(trial.status != "completed" for trial in self.trials)
        limit = len(self.levels) * self.num_samples
        counts = {"trials": len(self.trials), "known": self.known_trials, "limit": limit, "failed": failed}
        return {"stage": stage, **counts, "rungs": rungs, "best": best}


def _not_worse(trials: list[Trial]) -> list[Trial]:
    """Trials whose sample scores are not significantly below the best-scoring trial's (sign test on the same samples)."""
    scored = [t for t in trials if 3 in t.rungs and t.rungs[3].score is not None]
    if not scored or len(scored) < len(trials):
        return trials
    leader = max(scored, key=lambda t: (t.rungs[3].score or 0.0, -t.last.error))
    reference = leader.rungs[3].sample_scores or []

    def keeps_up(trial: Trial) -> bool:
        own = trial.rungs[3].sample_scores or []
        worse = sum(a < b for a, b in zip(own, reference, strict=True))
        better = sum(a > b for a, b in zip(own, reference, strict=True))
        return worse <= better or sign_test(better, worse) >= SIGNIFICANT

    return [t for t in scored if keeps_up(t)]


def _moves_front(trial: Trial, before: list[Trial]) -> bool:
    """Whether a trial is better, by more than a hundredth, than all before it that are as sparse."""
    if 0 not in trial.rungs:
        return False
    own = trial.rungs[0]
    return not any(
        other.rungs[0].error <= 1.01 * own.error and other.rungs[0].density <= 1.01 * own.density
        for other in before
        if 0 in other.rungs
    )


def _fits(density: float, level: Level) -> bool:
    return level.budget is None or density <= level.budget


def _canonical(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True, default=str)
