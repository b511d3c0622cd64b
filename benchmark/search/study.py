"""One study: the search over one (model, task, masker combination), for all its budgets at once. Imports no Ray and no model.

The rungs: every configuration is replayed on a few rows and layers (rung 0); those near the best of a level, at most a tenth,
are promoted to the full replay (1); of these at most six finalists, or one for each level, are confirmed by a forced forward (2)
and by real generation with the task's own score (3). One configuration that is much better than all others is promoted alone.
After the full replays, head budgets are fitted for the best configuration of each level. With them it is one more finalist: as
many of the even ones are left out as are needed to confirm all finalists in one pass, but the best of no level.

A forced forward may measure a higher density than the replay, so that a finalist no longer fits its level. Therefore each
level may confirm up to three more configurations: while its confirmed ones have a clearly larger replayed error than an
unconfirmed one that is expected to fit (its density times the largest increase that a forced forward has measured so far), that
one is confirmed too. Where no confirmed configuration fits a level, the best replayed one that fits is reported.

Proposals come from seeded Optuna studies (`proposals.py`), and each is looked up in a journal before it is evaluated. An
interrupted study therefore resumes when it is run again: journalled evaluations are reused and the outcome is the same.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmark.search.proposals import BATCH, Proposals
from benchmark.search.ranking import Ranking, alive, error_of
from benchmark.search.space import CombinationSpace
from benchmark.search.trial import FIT_VERSION, RUNGS, Evaluator, Level, Progress, plain_params
from benchmark.storage.records import BudgetOn, read_lines, to_json
from benchmark.storage.results import Journal
from benchmark.storage.search_records import (
    Best,
    Evaluation,
    EvaluationRecord,
    FitRecord,
    FittedTable,
    HeadBudgetTable,
    StudyLine,
    Trial,
)
from benchmark.workers.errors import BrokenDeviceError, check_device, is_transient
from benchmark.workers.limits import TimeLimitError
from sparse_attention_hub import ResearchAttentionConfig
from sparse_attention_hub.errors import UserError, quoted

MAX_FINALISTS = 6
PROMOTED_SHARE = 0.1
#: Configurations in one pass of full replay, which computes and sorts the scores of all rows once: half of what a pass over 8
#: top-k configurations takes at 4k.
FULL_REPLAY_BATCH = 32
MAX_REFILLS = 3
#: Head budgets are confirmed if their replayed error is less than this share of that of even ones.
WORTH_CONFIRMING = 0.98
#: Those that spend too much are tried again at this share of what even ones spend.
SHRUNK = 0.99
MAX_DUPLICATES = 24

#: The outcome of an evaluation: its figures, None if one is not a finite number, or why it failed.
_Found = Evaluation | Exception | str | None


class Study:
    """Runs in steps, `for progress in study.run()`; `trials` and `best()` are its result."""

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
        budget_on: BudgetOn = "density",
        head_budgets: str = "off",
    ) -> None:
        self.space, self.levels, self.evaluator, self.journal = space, levels, evaluator, journal
        self.num_samples, self.timeout, self.seed, self.objective = num_samples, timeout, seed, objective
        self.ranking, self.head_budgets = Ranking(levels, objective, budget_on), head_budgets
        self.trials: list[Trial] = []
        # Trials whose rung 0 was in the journal, and the time that all evaluations in the journal took.
        self.known_trials, self.known_seconds = 0, 0.0
        self._known: dict[str, EvaluationRecord] = {}
        self._known_fits: dict[str, FitRecord] = {}
        self._retried: set[str] = set()  # keys of evaluations that had a transient failure before
        self._broke: Counter[str] = Counter()  # how often a device broke during the evaluation with this key

    def run(self) -> Iterator[Progress]:
        """Search, promote, confirm. Yields after every step, whose evaluations are in the journal by then.

        UserError if the journal cannot be read.
        """
        self._read_journal()
        if self.space.domains:
            yield from self._search()
        else:
            self._run_batch([self._new_trial({})], 0)
            yield self.progress("search")
        yield from self._climb()

    def _read_journal(self) -> None:
        """Timeouts under another limit, and first transient failures, are evaluated again."""
        for line in read_lines(self.journal.path, StudyLine, "remove the file to search again"):
            for record in line.evaluations:
                if record.transient:
                    self._retried.add(record.key)
                elif record.limit in (None, self.timeout):
                    self._known[record.key] = record
            if line.fit is not None and line.fit.transient:
                self._retried.add(line.fit.key)
            elif line.fit is not None and line.fit.limit in (None, self.timeout):
                self._known_fits[line.fit.key] = line.fit
            self._broke.update(line.broke)

    # -- rung 0 ------------------------------------------------------------------------------------------------------

    def _search(self) -> Iterator[Progress]:
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
            answers = [seen[_canonical(params)] for params in asked]
            proposals.tell([self._proposed(trial) if trial.status == "completed" else None for trial in answers])
            moved = any(self.ranking.moves_front(trial, before) for trial in fresh)
            since_moved = 0 if moved else since_moved + len(asked)
            yield self.progress("search")
            if all(trial.status == "timeout" for trial in self.trials):
                return  # none of the first batch, which holds the templates, ends in time: nor will others

    def _proposed(self, trial: Trial) -> Evaluation:
        """The figures that proposals go by: their density is what a budget limits."""
        figures = trial.rungs[0]
        return figures.model_copy(update={"density": self.ranking.spent(figures)})

    def _new_trial(self, params: Mapping[str, Any], table: HeadBudgetTable | None = None) -> Trial:
        trial = Trial(number=len(self.trials), params=plain_params(params), table=table)
        self.trials.append(trial)
        return trial

    # -- the higher rungs --------------------------------------------------------------------------------------------

    def _climb(self) -> Iterator[Progress]:
        rung0 = alive(self.trials, 0)
        limit = max(MAX_FINALISTS, math.ceil(PROMOTED_SHARE * len(rung0)))
        promoted = self.ranking.promote(rung0, 0, limit)
        yield from self._ascend(promoted, (1,))
        replayed = alive(promoted, 1)
        uneven = yield from self._uneven(replayed)
        # One pass of the model over all finalists: those with head budgets take the room of second best ones.
        limit = max(len(self.levels), min(MAX_FINALISTS, BATCH - len(uneven)))
        yield from self._ascend(self.ranking.promote(replayed, 1, limit) + uneven, (2, 3))
        for _ in range(MAX_REFILLS):
            yield from self._ascend(self.ranking.refills(self.trials), (1, 2, 3))
        for trial in self.trials:
            if trial.status == "completed" and trial.reached is not None and trial.reached < len(RUNGS) - 1:
                trial.pruned_at = trial.reached

    def _ascend(self, trials: list[Trial], rungs: tuple[int, ...]) -> Iterator[Progress]:
        for rung in rungs:
            waiting = [t for t in trials if t.status == "completed" and rung not in t.rungs]
            size = FULL_REPLAY_BATCH if rung == 1 else BATCH
            for start in range(0, len(waiting), size):
                self._run_batch(waiting[start : start + size], rung)
                yield self.progress(RUNGS[rung])

    def _uneven(self, replayed: list[Trial]) -> Generator[Progress, None, list[Trial]]:
        """One more finalist per level: the level's best trial with head budgets that were fitted to it, if these have a clearly
        smaller replayed error."""
        bases: dict[int, Level] = {}  # number of a trial -> the level that it is the best of
        for level in self.levels if self.head_budgets != "off" else ():
            best = self.ranking.ordered(replayed, 1, level)[:1]
            if level.budget is not None and not level.template.fixed and best and self.ranking.fits(best[0].rungs[1], level):
                bases.setdefault(best[0].number, level)
        if not bases:
            return []
        bases = dict(sorted(bases.items(), key=lambda entry: self.ranking.spent(self.trials[entry[0]].rungs[1])))
        fit = self._fit([self.trials[number] for number in bases])
        if fit.error_message is not None:
            failed = self._new_trial(self.trials[next(iter(bases))].params)
            failed.status, failed.transient = "failed", fit.transient
            failed.error_message = f"fitting head budgets: {fit.error_message}"
        uneven = []
        for (number, level), table in zip(bases.items(), fit.tables, strict=True):
            if table is not None:
                own = HeadBudgetTable(level=level.name, base=number, **dict(table))
                uneven.append(self._new_trial(self.trials[number].params, own))
        yield from self._ascend(uneven, (0, 1))
        smaller = [
            self._shrunk(trial) for trial in alive(uneven, 1) if not self.ranking.fits(trial.rungs[1], self._level(trial))
        ]
        yield from self._ascend(smaller, (0, 1))
        return [
            trial
            for trial in alive(uneven + smaller, 1)
            if trial.table is not None
            and self.ranking.fits(trial.rungs[1], self._level(trial))
            and error_of(trial.rungs[1]) < WORTH_CONFIRMING * error_of(self.trials[trial.table.base].rungs[1])
        ]

    def _level(self, uneven: Trial) -> Level:
        """The level that a trial's table was fitted for."""
        return next(level for level in self.levels if uneven.table is not None and level.name == uneven.table.level)

    def _shrunk(self, uneven: Trial) -> Trial:
        """A trial with smaller factors than one that spends too much: small sizes are rounded otherwise than those of the curves,
        and of other proportions."""
        assert uneven.table is not None
        share = SHRUNK * self.ranking.spent(self.trials[uneven.table.base].rungs[1]) / self.ranking.spent(uneven.rungs[1])
        factors = [[float(f"{share * factor:.4g}") for factor in row] for row in uneven.table.factors]
        return self._new_trial(uneven.params, uneven.table.model_copy(update={"factors": factors}))

    def _fit(self, bases: list[Trial]) -> FitRecord:
        """Head budgets for each of these trials, from the journal where possible."""
        by = self.head_budgets
        key = json.dumps(["fit", FIT_VERSION, by, [_canonical(trial.params) for trial in bases], self.evaluator.key])
        if key in self._known_fits:
            self.known_seconds += self._known_fits[key].seconds
            return self._known_fits[key]
        started = time.perf_counter()
        tables: list[FittedTable | None] = [None] * len(bases)
        problem, limit, transient = None, None, False
        if self._broke[key]:
            problem = "broke its device"
        else:
            try:
                configs = [self.config_of(trial) for trial in bases]
                tables = [
                    found and FittedTable(by=by, strength=found.strength, held_out=found.held_out, factors=found.table)
                    for found in self.evaluator.fit_head_budgets(configs, by, self.timeout)
                ]
            except UserError:
                raise
            except TimeLimitError:
                limit, problem = self.timeout, f"took longer than --search-timeout {self.timeout:g} s for each level: raise it"
            except Exception as error:
                self._check_device(error, [key])
                problem = f"{type(error).__name__}: {quoted(error, 500)}"
                transient = is_transient(error) and key not in self._retried
        seconds = time.perf_counter() - started
        fit = FitRecord(key=key, tables=tables, error_message=problem, limit=limit, transient=transient, seconds=seconds)
        self.journal.append(to_json(StudyLine(fit=fit)))
        return fit

    # -- evaluating --------------------------------------------------------------------------------------------------

    def _run_batch(self, trials: list[Trial], rung: int) -> None:
        """Evaluate trials on a rung: from the journal where possible, the others in one pass. If that pass fails, one by one,
        so that only the trial at fault fails."""
        waiting: list[tuple[Trial, ResearchAttentionConfig]] = []
        for trial in trials:
            key = self._journal_key(trial, rung)
            if (record := self._known.get(key)) is not None:
                _settle(trial, record)
                self.known_trials += rung == 0
                self.known_seconds += trial.rungs[rung].seconds if rung in trial.rungs else 0.0
            elif trial.seconds >= self.timeout:
                self._write([trial], rung, [TimeLimitError()])
            elif self._broke[key] > 1:
                self._write([trial], rung, ["broke its device twice, the second time alone"])
            else:
                try:
                    waiting.append((trial, self.config_of(trial)))
                except ValueError as error:
                    self._write([trial], rung, [str(error)])
        if not waiting:
            return
        batch = [trial for trial, _ in waiting]
        keys = [self._journal_key(trial, rung) for trial in batch]
        found: Sequence[_Found] | None = None
        if len(batch) == 1 or not self._broke.keys() & keys:
            left = sum(self.timeout - trial.seconds for trial in batch)
            try:
                found = self.evaluator.evaluate([config for _, config in waiting], rung, left / len(batch))
            except UserError:  # concerns the whole study
                raise
            except Exception as error:
                self._check_device(error, keys)
                found = [error] if len(batch) == 1 else None
        if found is None:
            for trial in batch:
                self._run_batch([trial], rung)
        else:
            self._write(batch, rung, found)

    def _check_device(self, error: Exception, keys: list[str]) -> None:
        """BrokenDeviceError if the error means that the device is broken; the journal then says what was running."""
        try:
            check_device(error)
        except BrokenDeviceError:
            self.journal.append(to_json(StudyLine(broke=keys)))
            raise

    def _write(self, trials: list[Trial], rung: int, found: Sequence[_Found]) -> None:
        """Write what was found for each trial to the journal, and enter it into the trials. One line: a batch was evaluated in
        one pass, and a restart must not split it."""
        records = [self._record(trial, rung, entry) for trial, entry in zip(trials, found, strict=True)]
        self.journal.append(to_json(StudyLine(evaluations=records)))
        for trial, record in zip(trials, records, strict=True):
            _settle(trial, record)

    def _record(self, trial: Trial, rung: int, found: _Found) -> EvaluationRecord:
        record = EvaluationRecord(
            key=self._journal_key(trial, rung),
            params=trial.params,
            rung=rung,
            status="failed",
            error_message=None,
            evaluation=None,
            limit=None,
            transient=False,
            time=time.time(),
        )
        if isinstance(found, Evaluation) and trial.seconds + found.seconds <= self.timeout:
            record.status, record.evaluation = "completed", found
        elif isinstance(found, Evaluation | TimeLimitError):
            late = f"took longer than {self.timeout:g} s over its rungs (--search-timeout), before the end of {RUNGS[rung]}"
            record.status, record.limit = "timeout", self.timeout
            record.error_message = f"{late}: raise it, or lower --search-max-requests"
        elif isinstance(found, Exception):
            record.error_message = f"{type(found).__name__}: {quoted(found, 500)}"
            record.transient = is_transient(found) and record.key not in self._retried
        else:
            record.error_message = found or f"not a number on rung {rung} ({RUNGS[rung]})"
        return record

    def _journal_key(self, trial: Trial, rung: int) -> str:
        own = [] if trial.table is None else [trial.table.factors]
        return json.dumps([_canonical(trial.params), rung, self.evaluator.key, *own])

    # -- results -----------------------------------------------------------------------------------------------------

    def best(self) -> list[Best]:
        """The best of each level; see Ranking.best."""
        return self.ranking.best(self.trials)

    def best_even(self) -> dict[str, Best]:
        """Level -> its best trial without a table, for the levels that a table was fitted for or is the best of."""
        levels = {trial.table.level for trial in self.trials if trial.table is not None}
        levels |= {best.level for best in self.best() if self.trials[best.trial].table is not None}
        even = [trial for trial in self.trials if trial.table is None]
        return {best.level: best for best in self.ranking.best(even) if best.level in levels}

    def config_of(self, trial: Trial) -> ResearchAttentionConfig:
        """A trial's configuration. ValueError where a masker config refuses its values."""
        config = self.space.build(trial.params)
        return config if trial.table is None else replace(config, head_budgets=trial.table.factors)

    def problem(self) -> str | None:
        """Why levels have no best configuration; None if all have one."""
        if self.best():  # then every level has one
            return None
        first = next((trial.error_message for trial in self.trials if trial.error_message), "no trial was evaluated")
        return f"nothing found for {', '.join(level.name for level in self.levels)}: {first}"

    def progress(self, stage: str) -> Progress:
        error = {best.level: error_of(self.trials[best.trial].last) for best in self.best() if best.meets_budget}
        return Progress(
            stage,
            trials=len(self.trials),
            known=self.known_trials,
            failed=sum(trial.status != "completed" for trial in self.trials),
            rungs=tuple(sum(rung in trial.rungs for trial in self.trials) for rung in range(len(RUNGS))),
            best={level.name: error.get(level.name) for level in self.levels},
        )


def _settle(trial: Trial, record: EvaluationRecord) -> None:
    """Enter the outcome of an evaluation into its trial."""
    trial.status, trial.error_message, trial.finished = record.status, record.error_message, record.time
    trial.transient = record.transient
    if record.evaluation is not None:
        trial.rungs[record.rung] = record.evaluation


def _canonical(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True, default=str)
