"""One study: the search over one (model, task, masker combination), for all its budgets at once. Imports no Ray and no model.

The rungs: every configuration is replayed on a few rows and layers (rung 0); those near the best of a level, at most a tenth,
are promoted to the full replay (1); of these at most six finalists are confirmed by a forced forward (2) and by real generation
with the task's own score (3). One configuration that is much better than all others is promoted alone.

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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmark.search.proposals import BATCH, Proposals
from benchmark.search.space import CombinationSpace
from benchmark.search.trial import RUNGS, Evaluator, Level, Progress, TrialTimeout, objective_value, plain_params
from benchmark.stats import sign_test
from benchmark.storage.records import read_lines, to_json
from benchmark.storage.results import Journal
from benchmark.storage.search_records import Best, Evaluation, EvaluationRecord, StudyLine, Trial
from benchmark.workers.errors import BrokenDeviceError, check_device, is_transient
from sparse_attention_hub import ResearchAttentionConfig
from sparse_attention_hub.errors import UserError, quoted

MAX_FINALISTS = 6
PROMOTED_SHARE = 0.1
#: Configurations in one pass of full replay, which computes and sorts the scores of all rows once: half of what a pass over 8
#: top-k configurations takes at 4k.
FULL_REPLAY_BATCH = 32
DENSITY_SLACK = 1.05
DENSITY_MARGIN = 0.995
ERROR_SLACK = 1.2
CLEARLY = 1.1  # replay cannot rank two configurations whose errors differ by a smaller ratio
MAX_REFILLS = 3
MAX_DUPLICATES = 24
SIGNIFICANT = 0.05

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
    ) -> None:
        self.space, self.levels, self.evaluator, self.journal = space, levels, evaluator, journal
        self.num_samples, self.timeout, self.seed, self.objective = num_samples, timeout, seed, objective
        self.trials: list[Trial] = []
        # Trials whose rung 0 was in the journal, and the time that all evaluations in the journal took.
        self.known_trials, self.known_seconds = 0, 0.0
        self._known: dict[str, EvaluationRecord] = {}
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
            proposals.tell([trial.rungs[0] if trial.status == "completed" else None for trial in answers])
            moved = any(_moves_front(trial, before) for trial in fresh)
            since_moved = 0 if moved else since_moved + len(asked)
            yield self.progress("search")
            if all(trial.status == "timeout" for trial in self.trials):
                return  # none of the first batch, which holds the templates, ends in time: nor will others

    def _new_trial(self, params: Mapping[str, Any]) -> Trial:
        trial = Trial(number=len(self.trials), params=plain_params(params))
        self.trials.append(trial)
        return trial

    # -- the higher rungs --------------------------------------------------------------------------------------------

    def _climb(self) -> Iterator[Progress]:
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

    def _ascend(self, trials: list[Trial], rungs: tuple[int, ...]) -> Iterator[Progress]:
        for rung in rungs:
            waiting = [t for t in trials if t.status == "completed" and rung not in t.rungs]
            size = FULL_REPLAY_BATCH if rung == 1 else BATCH
            for start in range(0, len(waiting), size):
                self._run_batch(waiting[start : start + size], rung)
                yield self.progress(RUNGS[rung])

    def _refills(self) -> list[Trial]:
        """For each level whose confirmed trials are clearly worse than one that is expected to fit: that one."""
        chosen: list[Trial] = []
        for level in self.levels:
            confirmed = [t for t in self._alive(3) if _fits(t.last.density, level)]
            better: list[tuple[int, float, int]] = []
            for trial in self._alive(0):
                rung = min(1, trial.reached or 0)
                value = self._value(trial.rungs[rung], level)
                confirmed_value = min((self._value(t.rungs[rung], level) for t in confirmed), default=math.inf)
                if 2 not in trial.rungs and _fits(self._expected_density(trial), level) and CLEARLY * value < confirmed_value:
                    better.append((-rung, value, trial.number))
            if better and (best := self.trials[min(better)[2]]) not in chosen:
                chosen.append(best)
        return chosen

    def _expected_density(self, trial: Trial) -> float:
        """The density that a forced forward would measure: the replayed one times the largest increase measured so far."""
        if 2 in trial.rungs:
            return trial.last.density
        rung = min(1, trial.reached or 0)
        added = max((t.rungs[2].density / t.rungs[rung].density for t in self._alive(2)), default=1.0)
        return trial.last.density * max(1.0, added)

    def _alive(self, rung: int) -> list[Trial]:
        return [trial for trial in self.trials if trial.status == "completed" and rung in trial.rungs]

    def _promote(self, trials: Sequence[Trial], rung: int, limit: int) -> list[Trial]:
        """Trials near the best of some level: density at most 1.05 x its budget, error at most 1.2 x its best error. The best
        of each level first, then the second best of each, up to `limit`.

        Trials within the budget precede those slightly above it, which a higher rung may find to fit: otherwise all finalists
        of a level could end slightly above its budget.
        """
        queues: list[list[Trial]] = []
        for level in self.levels:
            budget = level.budget or 1.0
            near = [t for t in trials if t.rungs[rung].density <= DENSITY_SLACK * budget]
            near.sort(
                key=lambda t: (t.rungs[rung].density > DENSITY_MARGIN * budget, self._value(t.rungs[rung], level), t.number)
            )
            if not near:
                # No configuration meets this budget: the closest one is confirmed, and reported with meets_budget false.
                near = sorted(trials, key=lambda t: (t.rungs[rung].density, t.number))[:1]
            best = _error(near[0].rungs[rung]) if near else 0.0
            queues.append([t for t in near if _error(t.rungs[rung]) <= ERROR_SLACK * best or level.budget is None])
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
                self._write([trial], rung, [TrialTimeout()])
            elif self._broke[key] > 1:
                self._write([trial], rung, ["broke its device twice, the second time alone"])
            else:
                try:
                    waiting.append((trial, self.space.build(trial.params)))
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
                try:
                    check_device(error)
                except BrokenDeviceError:
                    self.journal.append(to_json(StudyLine(broke=keys)))
                    raise
                found = [error] if len(batch) == 1 else None
        if found is None:
            for trial in batch:
                self._run_batch([trial], rung)
        else:
            self._write(batch, rung, found)

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
        elif isinstance(found, Evaluation | TrialTimeout):
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
        return json.dumps([_canonical(trial.params), rung, self.evaluator.key])

    # -- choosing ----------------------------------------------------------------------------------------------------

    def _value(self, figures: Evaluation, level: Level) -> float:
        """The value minimised at a level: the error under a budget, the objective without one."""
        if level.budget is None:
            return objective_value(self.objective, figures.error, figures.density)
        return _error(figures)

    def best(self) -> list[Best]:
        """The best of each level: the smallest confirmed error within the budget, among finalists whose score is not
        significantly worse than the best finalist's on the same samples. Where no confirmed trial fits, the smallest error
        among trials that fit on their highest rung, those that a forced forward is expected to keep within the budget first.
        A level without an evaluated trial is left out."""
        found: list[Best] = []
        measured = self._alive(0)
        for level in self.levels if measured else []:
            fits = [t for t in measured if _fits(t.last.density, level)]
            if fits:
                candidates = _not_worse([t for t in fits if 3 in t.rungs]) or fits
                chosen = min(
                    candidates,
                    key=lambda t: (not _fits(self._expected_density(t), level), self._value(t.last, level), t.number),
                )
            else:
                chosen = min(self._alive(3) or measured, key=lambda t: (t.last.density, t.number))
            confirmed = 3 in chosen.rungs
            found.append(
                Best(level=level.name, budget=level.budget, trial=chosen.number, meets_budget=bool(fits), confirmed=confirmed)
            )
        return found

    def problem(self) -> str | None:
        """Why levels have no best configuration; None if all have one."""
        if self.best():  # then every level has one
            return None
        first = next((trial.error_message for trial in self.trials if trial.error_message), "no trial was evaluated")
        return f"nothing found for {', '.join(level.name for level in self.levels)}: {first}"

    def progress(self, stage: str) -> Progress:
        alive = self._alive(0)
        return Progress(
            stage,
            trials=len(self.trials),
            known=self.known_trials,
            failed=sum(trial.status != "completed" for trial in self.trials),
            rungs=tuple(sum(rung in trial.rungs for trial in self.trials) for rung in range(len(RUNGS))),
            best={
                level.name: min((_error(t.last) for t in alive if _fits(t.last.density, level)), default=None)
                for level in self.levels
            },
        )


def _settle(trial: Trial, record: EvaluationRecord) -> None:
    """Enter the outcome of an evaluation into its trial."""
    trial.status, trial.error_message, trial.finished = record.status, record.error_message, record.time
    trial.transient = record.transient
    if record.evaluation is not None:
        trial.rungs[record.rung] = record.evaluation


def _not_worse(trials: list[Trial]) -> list[Trial]:
    """Confirmed trials whose sample scores are not significantly below the best-scoring trial's (sign test on the same samples);
    all where a score is missing."""
    scores = [t.rungs[3].sample_scores for t in trials]
    if not trials or None in scores:
        return trials
    leader = max(trials, key=lambda t: (t.rungs[3].score or 0.0, -_error(t.last)))
    kept = []
    for trial, own in zip(trials, scores, strict=True):
        pairs = list(zip(own or [], leader.rungs[3].sample_scores or [], strict=True))
        worse, better = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
        if worse <= better or (sign_test(better, worse) or 0.0) >= SIGNIFICANT:
            kept.append(trial)
    return kept


def _moves_front(trial: Trial, before: list[Trial]) -> bool:
    """Whether no earlier trial has both an error and a density within 1% of this one's or below."""
    if 0 not in trial.rungs:
        return False
    own = trial.rungs[0]
    earlier = [other.rungs[0] for other in before if 0 in other.rungs]
    return not any(_error(e) <= 1.01 * _error(own) and e.density <= 1.01 * own.density for e in earlier)


def _error(figures: Evaluation) -> float:
    """The error on a rung that measures it."""
    assert figures.error is not None
    return figures.error


def _fits(density: float, level: Level) -> bool:
    return level.budget is None or density <= level.budget


def _canonical(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True, default=str)
