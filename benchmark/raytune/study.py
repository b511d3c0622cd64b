"""One study: the search for one (model, task, masker combination), for all its budgets at once. No Ray, no model in here.

The ladder: every configuration is replayed on a few rows and layers (rung 0); the best go on to the full replay (1); at most
six finalists are confirmed by a forced forward (2) and by real generation with the task's own score (3).

A study asks a seeded Optuna study for configurations and looks each up in a journal before evaluating it, so one that was
killed goes on where it was by simply running again: what was journalled is not evaluated twice, and the outcome is the same.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from benchmark.results import Journal
from benchmark.statistics import sign_test
from sparse_attention_hub import ResearchAttentionConfig
from sparse_attention_hub.errors import UserError

from .optimizer_factory import CombinationSpace

BATCH = 8
MAX_FINALISTS = 6
PROMOTED_SHARE = 0.1
DENSITY_SLACK = 1.05
DENSITY_MARGIN = 0.995
ERROR_SLACK = 1.2
MAX_DUPLICATES = 24
SIGNIFICANT = 0.05
RUNGS = ("replay of some rows and layers", "full replay", "forced forward", "generation")


class TrialTimeout(Exception):
    """A trial took longer than --search-timeout."""


@dataclass
class Evaluation:
    """Figures of one configuration on one rung, means over the tuning samples. None = this rung does not tell it."""

    error: float
    density: float
    seconds: float
    kv_fraction: float | None = None
    score: float | None = None
    sample_scores: list[float] | None = None
    reference_nll: float | None = None
    reproduced: float | None = None
    layer_errors: list[float] | None = None
    layer_densities: list[float] | None = None


class Evaluator(Protocol):
    """What a study needs of the world. `key` changes whenever its figures might."""

    key: str

    def evaluate(self, configs: list[ResearchAttentionConfig], rung: int, timeout: float) -> list[Evaluation]:
        """Evaluations in order. TrialTimeout if it takes longer than timeout * len(configs) seconds."""
        ...


@dataclass(frozen=True)
class Level:
    """One budget of a combination: its full name, the budget (None = no budget, the objective decides), its template."""

    name: str
    budget: float | None
    template: ResearchAttentionConfig


@dataclass
class Trial:
    """One configuration. status: "completed", "failed" or "timeout"; rungs: what each rung said."""

    number: int
    params: dict[str, Any]
    status: str = "completed"
    error_message: str | None = None
    rungs: dict[int, Evaluation] = field(default_factory=dict)
    pruned_at: int | None = None

    @property
    def reached(self) -> int | None:
        """The highest rung evaluated."""
        return max(self.rungs, default=None)

    def at_most(self, rung: int) -> Evaluation:
        return self.rungs[max(r for r in self.rungs if r <= rung)]

    @property
    def last(self) -> Evaluation:
        """The figures of the highest rung that measures error and density."""
        return self.at_most(2)


@dataclass
class Best:
    """What was found for one level. meets_budget False: no configuration met it, this is the closest."""

    level: str
    budget: float | None
    trial: int
    meets_budget: bool
    confirmed: bool


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
        self._known: dict[str, dict[str, Any]] = {}

    def run(self) -> Iterator[dict[str, Any]]:
        """Search, climb, confirm. Yields progress after every step; each step's figures are journalled before."""
        self._known = {record["key"]: record for record in self.journal.read() if "key" in record}
        if self.space.domains:
            yield from self._search()
        else:
            self._run_batch([self._new_trial({})], 0)
            yield self.progress("search")
        yield from self._climb()

    # -- rung 0 ------------------------------------------------------------------------------------------------------

    def _search(self) -> Iterator[dict[str, Any]]:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        distributions = OptunaSearch.convert_search_space(self.space.ray_space())
        limit = len(self.levels) * self.num_samples
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna marks batch options as experimental
            sampler = optuna.samplers.TPESampler(
                seed=self.seed, multivariate=True, constant_liar=True, n_startup_trials=min(2 * BATCH, max(4, limit // 4))
            )
            study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
            for level in self.levels:
                study.enqueue_trial(self.space.template_values(level.template), skip_if_exists=True)
            seen: dict[str, Trial] = {}
            duplicates = since_moved = 0
            while len(self.trials) < limit and duplicates < MAX_DUPLICATES and since_moved < self.num_samples:
                asked = [study.ask(distributions) for _ in range(min(BATCH, limit - len(self.trials)))]
                fresh: list[Trial] = []
                for candidate in asked:
                    name = _canonical(candidate.params)
                    duplicates = duplicates + 1 if name in seen else 0
                    if name not in seen:
                        seen[name] = self._new_trial(dict(candidate.params))
                        fresh.append(seen[name])
                before = list(self.trials)[: len(self.trials) - len(fresh)]
                self._run_batch(fresh, 0)
                for candidate in asked:
                    trial = seen[_canonical(candidate.params)]
                    if trial.status == "completed":
                        figures = trial.rungs[0]
                        # Orders of magnitude, so that the front is searched as closely at 5% as at 50%.
                        study.tell(candidate, [math.log10(figures.error + 1e-6), math.log10(figures.density + 1e-6)])
                    else:
                        study.tell(candidate, state=optuna.trial.TrialState.FAIL)
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
        for start in range(0, len(promoted), BATCH):
            self._run_batch(promoted[start : start + BATCH], 1)
            yield self.progress("full replay")
        finalists = self._promote([t for t in promoted if t.status == "completed"], 1, MAX_FINALISTS)
        for rung in (2, 3):
            self._run_batch([t for t in finalists if t.status == "completed"], rung)
            yield self.progress(RUNGS[rung])
        for trial in self.trials:
            if trial.status == "completed" and trial.reached is not None and trial.reached < len(RUNGS) - 1:
                trial.pruned_at = trial.reached

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
                continue
            try:
                waiting.append((trial, self.space.build(trial.params)))
            except ValueError as error:
                self._write(trial, rung, status="failed", error_message=str(error))
        if not waiting:
            return
        try:
            results = self.evaluator.evaluate([config for _, config in waiting], rung, self.timeout)
            for (trial, _), evaluation in zip(waiting, results, strict=True):
                self._write(trial, rung, evaluation=evaluation)
        except Exception as error:
            if len(waiting) == 1:
                self._fail(waiting[0][0], rung, error)
                return
            for trial, config in waiting:
                try:
                    self._write(trial, rung, evaluation=self.evaluator.evaluate([config], rung, self.timeout)[0])
                except Exception as error_of_one:
                    self._fail(trial, rung, error_of_one)

    def _fail(self, trial: Trial, rung: int, error: Exception) -> None:
        if isinstance(error, UserError):
            raise error
        status = "timeout" if isinstance(error, TrialTimeout) else "failed"
        message = str(error) if isinstance(error, TrialTimeout) else f"{type(error).__name__}: {error}"
        self._write(trial, rung, status=status, error_message=message)

    def _write(
        self,
        trial: Trial,
        rung: int,
        evaluation: Evaluation | None = None,
        status: str = "completed",
        error_message: str | None = None,
    ) -> None:
        if evaluation is not None and not (math.isfinite(evaluation.error) and math.isfinite(evaluation.density)):
            evaluation, status, error_message = None, "failed", f"not a number on rung {rung} ({RUNGS[rung]})"
        record = {
            "key": self._journal_key(trial, rung),
            "params": trial.params,
            "rung": rung,
            "status": status,
            "error_message": error_message,
            "evaluation": None if evaluation is None else asdict(evaluation),
            "time": time.time(),
        }
        self.journal.append(record)
        self.evaluated += 1
        self._settle(trial, rung, record)

    def _settle(self, trial: Trial, rung: int, record: dict[str, Any]) -> None:
        trial.status, trial.error_message = record["status"], record["error_message"]
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
        significantly worse than the best finalist's on the same samples. A level without any evaluated trial is left out."""
        found: list[Best] = []
        confirmed = self._alive(3)
        for level in self.levels:
            pool = confirmed or self._alive(0)
            if not pool:
                continue
            fits = [t for t in pool if level.budget is None or t.last.density <= level.budget]
            if fits:
                best = min(_not_worse(fits), key=lambda t, level=level: (self._value(t.last, level), t.number))  # type: ignore[misc]
            else:
                best = min(pool, key=lambda t: (t.last.density, t.number))
            found.append(Best(level.name, level.budget, best.number, bool(fits), bool(confirmed)))
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
        return {"stage": stage, "trials": len(self.trials), "limit": limit, "rungs": rungs, "failed": failed, "best": best}


def objective_value(objective: str, figures: Evaluation) -> float:
    """A trial's one number under --objective, smaller is better. "default": error + 0.1 density, above half the keys + 5;
    "sparsity_T": 0.99 error + 0.01 density, + 10 for each unit of density above T percent."""
    if objective == "default":
        return figures.error + 0.1 * figures.density + (5.0 if figures.density > 0.5 else 0.0)
    target = int(objective.removeprefix("sparsity_")) / 100
    return 0.99 * figures.error + 0.01 * figures.density + 10 * max(0.0, figures.density - target)


OBJECTIVES = ("default", "sparsity_5", "sparsity_10", "sparsity_15", "sparsity_20", "sparsity_25", "sparsity_50")


def _not_worse(trials: list[Trial]) -> list[Trial]:
    """Trials whose sample scores are not significantly below the best-scoring trial's (sign test on the same samples)."""
    scored = [t for t in trials if 3 in t.rungs and t.rungs[3].score is not None]
    if len(scored) < len(trials):
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


def _canonical(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True, default=str)


def with_deadline(seconds: float) -> Callable[[], None]:
    """A check that raises TrialTimeout once `seconds` have passed."""
    end = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > end:
            raise TrialTimeout(f"took longer than {seconds:g} s (--search-timeout)")

    return check
