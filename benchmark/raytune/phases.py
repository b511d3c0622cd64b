"""The two phases as a person sees them: what is run, how far it is, what came of it."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.search.config_search import SearchOutcome, new_run_name, run_search
from benchmark.search.spec import StudySpec, plan_studies, study_id
from benchmark.settings import Settings, SparseConfig
from benchmark.storage.rerun import ForcedRun

if TYPE_CHECKING:
    from benchmark.execution.runner import BenchmarkOutcome


@dataclass(frozen=True)
class SearchResult:
    """What Phase 1 hands to Phase 2. run_dir: None if there was nothing to search. failures: records for the summary."""

    run_dir: Path | None
    failures: list[dict[str, Any]]
    interrupted: bool = False
    forced: ForcedRun | None = None


class SearchReport:
    """Progress of Phase 1: one bar over all trials, and below it the study in work; plain lines where there is no terminal."""

    def __init__(self, studies: list[StudySpec], settings: Settings) -> None:
        from tqdm import tqdm

        self._total = {study_id(s): len(s.levels) * settings.num_samples if s.space().domains else 1 for s in studies}
        self._done: dict[str, int] = {}
        self._known: dict[str, int] = {}  # trials that this run found done
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

    def __call__(self, event: str, study: StudySpec | None, progress: dict[str, Any]) -> None:
        if event == "note":
            self._say(f"Phase 1: {progress['text']}")
            return
        assert study is not None
        key, name = study_id(study), self._name(study)
        if event == "reused":
            self._ended += 1
            self._advance(key, self._total[key], self._total[key])
            self._say(f"{name}: found before, copied from {progress['from']}")
        elif event == "failed":
            self._ended += 1
            self._say(f"{name}: FAILED, {progress['error']}")
        elif event == "finished":
            self._ended += 1
            # A study that stops early leaves no trials to wait for.
            self._advance(key, self._total[key], progress.get("known", 0))
            self._say(f"{self._counted()} {name}: {self._figures(progress)}")
        else:
            self._advance(key, progress.get("trials", 0), progress.get("known", 0))
            if self._tty:
                self._lines[0].set_description_str(f"{self._counted()} {name}")
                self._lines[1].set_description_str(f"    {self._figures(progress)}")
            if progress.get("tell"):
                self._say(f"{name}: {progress['stage']}")
            elif not self._tty and time.monotonic() - self._last_line > 5:
                self._say(f"{self._counted()} {name}: {self._figures(progress)}{self._left()}")

    def _counted(self) -> str:
        return f"[{self._ended}/{len(self._total)} studies]"

    def _left(self) -> str:
        """How long the rest takes at the pace so far; the bar of a terminal says so by itself."""
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
        """known: how many of these trials took no time in this run."""
        known -= self._known.get(key, 0)
        if known > 0:
            self._known[key] = self._known.get(key, 0) + known
            if self._tty:  # a bar that is off has no such number
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

    @staticmethod
    def _figures(progress: dict[str, Any]) -> str:
        if "trials" not in progress:
            return str(progress.get("stage", "waiting"))
        rungs = "/".join(str(count) for count in progress["rungs"])
        best = ", ".join(
            f"{name.rsplit('_', 1)[-1]} {error:.3f}" if error is not None else f"{name.rsplit('_', 1)[-1]} none"
            for name, error in progress["best"].items()
        )
        failed = f", {progress['failed']} failed" if progress["failed"] else ""
        return f"{progress['trials']} trials, rungs {rungs}{failed}; best error {best}"


def search(settings: Settings, configs: list[SparseConfig], tasks: list[str], notes: list[str]) -> SearchResult:
    """Phase 1, with its progress and its closing table."""
    studies, left_out = plan_studies(list(settings.models), tasks, configs)
    run_name = new_run_name(settings.optimal_configs_dir)
    where = f"into {settings.optimal_configs_dir / run_name}" if studies else "nothing to search"
    print(f"Phase 1: {len(studies)} studies of {len(tasks)} tasks on {', '.join(settings.models)}, {where}")
    for note in [*notes, *left_out]:
        print(f"note: {note}")
    if not studies:
        return SearchResult(None, [])
    report = SearchReport(studies, settings)
    try:
        outcome = run_search(studies, settings, run_name=run_name, report=report)
    finally:
        report.close()
    print(search_table(outcome))
    if outcome.interrupted:
        print("interrupted: what was evaluated is kept; run the same command again to go on", file=sys.stderr)
    elif outcome.forced is not None and 2 not in settings.phases:  # else it is forced until Phase 2 has ended too
        outcome.forced.end()
    return SearchResult(outcome.run_dir, search_failures(outcome, studies), outcome.interrupted, outcome.forced)


def search_failures(outcome: SearchOutcome, studies: list[StudySpec]) -> list[dict[str, Any]]:
    """One record a study that failed, as a whole or in some of its trials."""
    problems = _problems(outcome)
    return [
        {
            "phase": 1,
            "model": study.model,
            "task": study.task,
            "configuration": None,  # it belongs to no row of results
            "status": "failed",
            "problem": f"search of {study.name}: {problems[study_id(study)]}",
        }
        for study in studies
        if study_id(study) in problems
    ]


def _problems(outcome: SearchOutcome) -> dict[str, str]:
    """Study -> what went wrong in it."""
    trials = {
        name: f"{count} of its trials failed or timed out: see error_message in its _trials.json"
        for name, count in outcome.failed_trials.items()
        if count
    }
    return {**trials, **outcome.failures}


def search_table(outcome: SearchOutcome) -> str:
    """The best configuration of every level, one line each, at most 100 columns."""
    lines: list[str] = []
    heading = None
    levels = sorted(outcome.levels, key=lambda r: (r["model"], r["task"], r["masker_name"].rsplit("_", 1)[0], r["budget"] or 0))
    for level in levels:
        here = f"{level['task']} on {level['model']}"
        if here != heading:
            heading = here
            lines += ["", f"{_fit(heading, 58)} {'error':>6} {'density':>7} {'score':>6}"]
        score = "-" if level["score"] is None else f"{level['score']:.2f}"
        mark = "  over budget" if not level["meets_budget"] else "" if level["confirmation"]["confirmed"] else "  replayed"
        name = _fit(level["masker_name"], 56)
        lines.append(f"  {name} {level['error']:6.3f} {level['density']:7.3f} {score:>6}{mark}")
    if any(not level["meets_budget"] for level in levels):
        lines.append("over budget: no configuration of these met its budget; the closest is given")
    if any(level["meets_budget"] and not level["confirmation"]["confirmed"] for level in levels):
        lines.append("replayed: nothing that was confirmed fits; these are figures of the replay")
    lines += ["", *(f"FAILED {name}: {why}" for name, why in _problems(outcome).items())]
    lines.append("error and density: forced forward over question and dense answer; score: real answers to the tuning samples")
    lines.append(f"files: {outcome.run_dir}")
    return "\n".join(lines)


def benchmark(
    settings: Settings,
    configs: list[SparseConfig],
    tasks: list[str],
    notes: list[str],
    named: frozenset[str],
    search: SearchResult | None,
) -> BenchmarkOutcome:
    """Phase 2 with what `search` found, however little; None = with --config-run, or the newest run that has something.

    named: as check_found.
    """
    from benchmark.execution.runner import run_benchmarks
    from benchmark.execution.search_results import find_units, load_units
    from benchmark.report.__main__ import write_report
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
    outcome = run_benchmarks(units, settings, config_run=name, notes=[*notes, *left_out], failures=failures)
    if search is not None and search.forced is not None and not outcome.interrupted:
        search.forced.end()
    print("\n" + closing_table(outcome.summary))
    for record in outcome.failures:
        if record["configuration"] is None:  # no row of the table tells of it
            print(f"FAILED {record['task']} on {record['model']}: {record['problem']}")
    print(f"files: {settings.benchmark_results_dir}, summary: {settings.benchmark_results_dir / 'benchmark_summary.json'}")
    if outcome.summary.get("results"):
        print(f"report: {write_report(settings.benchmark_results_dir)}")
    return outcome


def check_found(settings: Settings, configs: list[SparseConfig], tasks: list[str], named: frozenset[str]) -> None:
    """UserError if Phase 2 alone would find nothing to run, or nothing of a configuration that was asked for by name (in
    `named`); nothing is written."""
    from benchmark.execution.search_results import find_units

    find_units(settings, configs, tasks, named)


def _fit(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "~"
