"""The two phases as the command line runs them: progress, closing tables, failures."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.progress import Progress as ProgressBar
from benchmark.report.table import closing_table, number, shorten
from benchmark.search.config_search import SearchOutcome, new_run_name, run_search
from benchmark.search.spec import StudySpec, plan_studies, study_id
from benchmark.search.trial import Progress
from benchmark.settings import Settings, SparseConfig
from benchmark.storage.benchmark_records import Summary
from benchmark.storage.records import SPENT, Failure
from benchmark.storage.rerun import ForcedRun
from benchmark.storage.search_records import BestConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from benchmark.raytune.plan import SampleCheck


@dataclass(frozen=True)
class SearchResult:
    """What Phase 2 needs of Phase 1. run_dir: None if there was nothing to search. failures: for the summary."""

    run_dir: Path | None
    failures: list[Failure]
    interrupted: bool = False
    forced: ForcedRun | None = None


class SearchReport:
    """Shows the progress of Phase 1: a bar over all trials, and which study is running."""

    def __init__(self, studies: list[StudySpec], settings: Settings) -> None:
        self._total = {study_id(s): len(s.levels) * settings.num_samples if s.space().domains else 1 for s in studies}
        self._done = dict.fromkeys(self._total, 0)
        self._known = dict.fromkeys(self._total, 0)  # trials that were not evaluated in this run
        self._ended = 0
        self._models = len(settings.models)
        self.bar = ProgressBar("Phase 1", 2, "trial")

    def note(self, text: str) -> None:
        self.bar.say(f"Phase 1: {text}")

    def progress(self, study: StudySpec, state: Progress) -> None:
        name = self._name(study)
        if state.announce:
            self.bar.say(f"{name}: {state.stage}")
        self._advance(study, state.trials or 0, state.known)
        self._show(name, _figures(state))

    def reused(self, study: StudySpec, run: str) -> None:
        self._end(study, f"{self._name(study)}: copied from {run}", known=self._total[study_id(study)])

    def finished(self, study: StudySpec, state: Progress) -> None:
        self._end(study, f"{self._name(study)}: {_figures(state)}", state.known)

    def failed(self, study: StudySpec, problem: str) -> None:
        self._end(study, f"{self._name(study)}: FAILED, {problem}", known=self._total[study_id(study)])

    def _end(self, study: StudySpec, text: str, known: int) -> None:
        self._ended += 1
        self._advance(study, self._total[study_id(study)], known)  # a study that stops early needs no more trials
        self.bar.say(f"{self._counted()} {text}")
        self._show()

    def _advance(self, study: StudySpec, trials: int, known: int) -> None:
        key = study_id(study)
        self._done[key] = max(self._done[key], min(trials, self._total[key]))
        self._known[key] = max(self._known[key], known)

    def _show(self, *texts: str) -> None:
        counted = [f"{self._counted()} {texts[0]}", *texts[1:]] if texts else []
        self.bar.update(sum(self._done.values()), sum(self._total.values()), counted, known=sum(self._known.values()))

    def _counted(self) -> str:
        return f"{self._ended} of {len(self._total)} studies"

    def _name(self, study: StudySpec) -> str:
        name = f"{study.task} {study.name}"
        return name if self._models == 1 else f"{study.model} {name}"


def _figures(state: Progress) -> str:
    if state.trials is None:
        return state.stage
    best = [f"{name.rsplit('_', 1)[-1]} {'none' if error is None else f'{error:.3f}'}" for name, error in state.best.items()]
    failed = f", {state.failed} failed" if state.failed else ""
    return f"{state.trials} trials, rungs {'/'.join(map(str, state.rungs))}{failed}; best error {', '.join(best)}"


def search(settings: Settings, configs: list[SparseConfig], samples: SampleCheck, notes: list[str]) -> SearchResult:
    """Run Phase 1 and print its closing table."""
    studies, left_out = plan_studies(list(settings.models), samples.tasks, configs)
    run_name = new_run_name(settings.optimal_configs_dir)
    where = f"into {settings.optimal_configs_dir / run_name}" if studies else "nothing to search"
    print(f"Phase 1: {len(studies)} studies of {len(samples.tasks)} tasks on {', '.join(settings.models)}, {where}")
    for note in [*notes, *left_out]:
        print(f"note: {note}")
    if not studies:
        return SearchResult(None, [])
    report = SearchReport(studies, settings)
    with report.bar:
        outcome = run_search(studies, settings, samples.tuning_keys, run_name=run_name, report=report)
    print(search_table(outcome))
    if outcome.interrupted:
        print("interrupted; all evaluations are kept: run the same command again to resume", file=sys.stderr)
    elif outcome.forced is not None and 2 not in settings.phases:  # otherwise it ends with Phase 2
        outcome.forced.end()
    return SearchResult(outcome.run_dir, search_failures(outcome, studies), outcome.interrupted, outcome.forced)


def search_failures(outcome: SearchOutcome, studies: list[StudySpec]) -> list[Failure]:
    """One record per study that failed, as a whole or in some of its trials."""
    problems = _problems(outcome)
    return [
        Failure(phase=1, model=s.model, task=s.task, status="failed", problem=f"search of {s.name}: {problems[study_id(s)]}")
        for s in studies
        if study_id(s) in problems
    ]


def _problems(outcome: SearchOutcome) -> dict[str, str]:
    """Study -> problem."""
    trials = {
        name: f"{count} of its trials failed or timed out: see error_message in its _trials.json"
        for name, count in outcome.failed_trials.items()
        if count
    }
    return {**trials, **outcome.failures}


def search_table(outcome: SearchOutcome) -> str:
    """The best configuration of every level, one line each, at most 100 columns wide."""
    lines: list[str] = []
    levels = sorted(
        outcome.levels, key=lambda best: (best.model, best.task, best.masker_name.rsplit("_", 1)[0], best.budget or 0)
    )
    kv = any(best.budget_on == "kv" for best in levels)
    for (model, task), found in groupby(levels, key=lambda best: (best.model, best.task)):
        spent = "KV" if kv else "density"
        lines += ["", f"{shorten(f'{task} on {model}', 58):<58} {'error':>6} {spent:>7} {'score':>6}"]
        for level in found:
            score = "-" if level.score is None else f"{level.score:.2f}"
            mark = "  over budget" if not level.meets_budget else "" if level.confirmation.confirmed else "  replayed"
            mark += "  uneven" if level.sparse_config.head_budgets is not None else ""
            name = shorten(level.masker_name, 56)
            lines.append(f"  {name:<56} {level.error:6.3f} {number(_spent(level)):>7} {score:>6}{mark}")
    if any(not level.meets_budget for level in levels):
        lines.append("over budget: no configuration met the budget; the closest one is shown")
    if any(level.meets_budget and not level.confirmation.confirmed for level in levels):
        lines.append("replayed: no confirmed configuration met the budget; error and density are those of the replay")
    if any(level.sparse_config.head_budgets is not None for level in levels):
        lines.append("uneven: with fitted head budgets (--head-budgets), which had a smaller error than even ones")
    if kv:
        lines.append("KV: share of the dense KV bytes, selector included, which the budgets are on (--budget-on kv)")
    lines += ["", *(f"FAILED {name}: {why}" for name, why in _problems(outcome).items())]
    lines += [f"interrupted {name}" for name in outcome.unfinished]
    lines.append("error and density: forced forward over question and dense answer; score: answers to the tuning samples")
    lines.append(f"files: {outcome.run_dir}")
    return "\n".join(lines)


def _spent(level: BestConfig) -> float | None:
    spent: float | None = getattr(level, SPENT[level.budget_on])
    return spent


def benchmark(
    settings: Settings,
    configs: list[SparseConfig],
    tasks: list[str],
    notes: list[str],
    named: frozenset[str],
    search: SearchResult | None,
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> Summary:
    """Run Phase 2 with the configurations of `search`, even if some are missing; None = of --config-run, else the newest of all
    runs.

    named: as of find_units. tokenizers: by model.
    """
    from benchmark.execution.runner import run_benchmarks
    from benchmark.execution.search_results import find_units, load_units

    if search is None:
        runs, units, left_out = find_units(settings, configs, tasks, named)
    else:
        made = [] if search.run_dir is None else [search.run_dir]
        runs, units, left_out = load_units(made, settings, configs, tasks)
    for note in left_out:
        print(f"note: {note}", file=sys.stderr)
    name = ", ".join(runs) or None
    pairs = sum(len(unit.configs) for unit in units)
    print(f"\nPhase 2: {pairs} (task, configuration) pairs, settings from {name or 'no search (dense only)'}")
    failures = [] if search is None else search.failures
    summary = run_benchmarks(
        units, settings, config_run=name, notes=[*notes, *left_out], failures=failures, tokenizers=tokenizers
    )
    if search is not None and search.forced is not None and not summary.interrupted:
        search.forced.end()
    print("\n" + closing_table(summary))
    for record in summary.failures:
        if record.configuration is None:  # not a row of the table
            print(f"FAILED {record.task} on {record.model}: {record.problem}")
    print(f"files: {settings.benchmark_results_dir}, summary: {settings.benchmark_results_dir / 'benchmark_summary.json'}")
    if summary.results:
        from benchmark.report.page import write_report  # loads matplotlib

        print(f"report: {write_report(settings.benchmark_results_dir)}")
    return summary
