"""The two phases as the command line runs them: progress, closing tables, failures."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.search.config_search import SearchOutcome, new_run_name, run_search
from benchmark.search.spec import StudySpec, plan_studies, study_id
from benchmark.search.trial import Progress
from benchmark.settings import Settings, SparseConfig
from benchmark.storage.records import Failure
from benchmark.storage.rerun import ForcedRun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from benchmark.execution.runner import BenchmarkOutcome
    from benchmark.raytune.plan import SampleCheck


@dataclass(frozen=True)
class SearchResult:
    """What Phase 2 needs of Phase 1. run_dir: None if there was nothing to search. failures: for the summary."""

    run_dir: Path | None
    failures: list[Failure]
    interrupted: bool = False
    forced: ForcedRun | None = None


class SearchReport:
    """Shows the progress of Phase 1: a bar over all trials and the running study below it; plain lines without a terminal."""

    def __init__(self, studies: list[StudySpec], settings: Settings) -> None:
        from tqdm import tqdm

        self._total = {study_id(s): len(s.levels) * settings.num_samples if s.space().domains else 1 for s in studies}
        self._done: dict[str, int] = {}
        self._known: dict[str, int] = {}  # trials that were not evaluated in this run
        self._ended = 0
        self._models = len(settings.models)
        self._tty = sys.stderr.isatty()
        self._last_line = 0.0
        self._started = time.monotonic()
        off = not self._tty
        self._bar = tqdm(total=sum(self._total.values()), unit="trial", desc="Phase 1", disable=off, dynamic_ncols=True)
        self._lines = [
            tqdm(bar_format="{desc}", position=place, leave=False, disable=off, dynamic_ncols=True) for place in (1, 2)
        ]

    def note(self, text: str) -> None:
        self._say(f"Phase 1: {text}")

    def progress(self, study: StudySpec, progress: Progress) -> None:
        name = self._name(study)
        self._advance(study_id(study), progress.trials or 0, progress.known)
        if self._tty:
            self._lines[0].set_description_str(f"{self._counted()} {name}")
            self._lines[1].set_description_str(f"    {_figures(progress)}")
        if progress.announce:
            self._say(f"{name}: {progress.stage}")
        elif not self._tty and time.monotonic() - self._last_line > 5:
            self._say(f"{self._counted()} {name}: {_figures(progress)}{self._left()}")

    def reused(self, study: StudySpec, run: str) -> None:
        self._ended += 1
        total = self._total[study_id(study)]
        self._advance(study_id(study), total, total)
        self._say(f"{self._name(study)}: copied from {run}")

    def finished(self, study: StudySpec, progress: Progress) -> None:
        self._ended += 1
        # A study that stops early has no more trials to wait for.
        self._advance(study_id(study), self._total[study_id(study)], progress.known)
        self._say(f"{self._counted()} {self._name(study)}: {_figures(progress)}")

    def failed(self, study: StudySpec, problem: str) -> None:
        self._ended += 1
        self._say(f"{self._name(study)}: FAILED, {problem}")

    def _counted(self) -> str:
        return f"[{self._ended}/{len(self._total)} studies]"

    def _left(self) -> str:
        """The remaining time at the pace so far."""
        done, total = sum(self._done.values()), sum(self._total.values())
        worked = done - sum(self._known.values())
        if worked <= 0:
            return ""
        seconds = (time.monotonic() - self._started) / worked * (total - done)
        return f"; {done} of {total} trials, about {seconds / 60:.0f} min left"

    def close(self) -> None:
        for line in reversed(self._lines):
            line.close()
        self._bar.close()

    def _name(self, study: StudySpec) -> str:
        name = f"{study.task} {study.name}"
        return name if self._models == 1 else f"{study.model} {name}"

    def _advance(self, key: str, trials: int, known: int) -> None:
        """known: how many of these trials were not evaluated in this run."""
        known -= self._known.get(key, 0)
        if known > 0:
            self._known[key] = self._known.get(key, 0) + known
            if self._tty:  # a disabled bar has no such attribute
                self._bar.initial += known
        step = min(trials, self._total[key]) - self._done.get(key, 0)
        if step > 0:
            self._done[key] = self._done.get(key, 0) + step
            self._bar.update(step)

    def _say(self, text: str) -> None:
        if self._tty:
            self._bar.write(text, file=sys.stderr)
        else:
            self._last_line = time.monotonic()
            print(text, file=sys.stderr, flush=True)


def _figures(progress: Progress) -> str:
    if progress.trials is None:
        return progress.stage
    best = ", ".join(
        f"{name.rsplit('_', 1)[-1]} {'none' if error is None else f'{error:.3f}'}" for name, error in progress.best.items()
    )
    failed = f", {progress.failed} failed" if progress.failed else ""
    return f"{progress.trials} trials, rungs {'/'.join(map(str, progress.rungs))}{failed}; best error {best}"


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
    try:
        outcome = run_search(studies, settings, samples.tuning_keys, run_name=run_name, report=report)
    finally:
        report.close()
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
        Failure(
            phase=1,
            model=study.model,
            task=study.task,
            configuration=None,
            status="failed",
            problem=f"search of {study.name}: {problems[study_id(study)]}",
        )
        for study in studies
        if study_id(study) in problems
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
    heading = None
    levels = sorted(
        outcome.levels, key=lambda best: (best.model, best.task, best.masker_name.rsplit("_", 1)[0], best.budget or 0)
    )
    for level in levels:
        here = f"{level.task} on {level.model}"
        if here != heading:
            heading = here
            lines += ["", f"{_fit(heading, 58)} {'error':>6} {'density':>7} {'score':>6}"]
        score = "-" if level.score is None else f"{level.score:.2f}"
        mark = "  over budget" if not level.meets_budget else "" if level.confirmation.confirmed else "  replayed"
        lines.append(f"  {_fit(level.masker_name, 56)} {level.error:6.3f} {level.density:7.3f} {score:>6}{mark}")
    if any(not level.meets_budget for level in levels):
        lines.append("over budget: no configuration met the budget; the closest one is shown")
    if any(level.meets_budget and not level.confirmation.confirmed for level in levels):
        lines.append("replayed: no confirmed configuration met the budget; error and density are those of the replay")
    lines += ["", *(f"FAILED {name}: {why}" for name, why in _problems(outcome).items())]
    lines.append("error and density: forced forward over question and dense answer; score: answers to the tuning samples")
    lines.append(f"files: {outcome.run_dir}")
    return "\n".join(lines)


def benchmark(
    settings: Settings,
    configs: list[SparseConfig],
    tasks: list[str],
    notes: list[str],
    named: frozenset[str],
    search: SearchResult | None,
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> BenchmarkOutcome:
    """Run Phase 2 with the configurations of `search`, even if some are missing; None = of --config-run or the newest run.

    named: as check_found. tokenizers: by model.
    """
    from benchmark.execution.runner import run_benchmarks
    from benchmark.execution.search_results import find_units, load_units
    from benchmark.report.table import closing_table

    if search is None:
        run, units, left_out = find_units(settings, configs, tasks, named)
    else:
        run = search.run_dir
        units, left_out = load_units(run, settings, configs, tasks)
    for note in left_out:
        print(f"note: {note}", file=sys.stderr)
    name = None if run is None else run.name
    pairs = sum(len(unit.configs) for unit in units)
    print(f"\nPhase 2: {pairs} (task, configuration) pairs, settings from {name or 'no search (dense only)'}")
    failures = [] if search is None else search.failures
    outcome = run_benchmarks(
        units, settings, config_run=name, notes=[*notes, *left_out], failures=failures, tokenizers=tokenizers
    )
    if search is not None and search.forced is not None and not outcome.interrupted:
        search.forced.end()
    print("\n" + closing_table(outcome.summary))
    for record in outcome.failures:
        if record.configuration is None:  # not a row of the table
            print(f"FAILED {record.task} on {record.model}: {record.problem}")
    print(f"files: {settings.benchmark_results_dir}, summary: {settings.benchmark_results_dir / 'benchmark_summary.json'}")
    if outcome.summary.results:
        from benchmark.report.page import write_report  # loads matplotlib

        print(f"report: {write_report(settings.benchmark_results_dir)}")
    return outcome


def check_found(settings: Settings, configs: list[SparseConfig], tasks: list[str], named: frozenset[str]) -> None:
    """UserError if Phase 2 alone would find nothing to run, or nothing for a configuration in `named`. Writes nothing."""
    from benchmark.execution.search_results import find_units

    find_units(settings, configs, tasks, named)


def _fit(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "~"
