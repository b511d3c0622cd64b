"""The files of one configuration on one task, made from the journals: raw_results.csv, metrics.json, config.json and
micro_metrics.jsonl; and the summary of a run. Each file is written whole. Scoring happens here, so that answers can be scored
again with another metric."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmark.execution.jobs import BenchmarkUnit, UnitRun
from benchmark.execution.messages import error_message
from benchmark.settings import BUDGET_SLACK, Settings, SparseConfig
from benchmark.stats import compare_paired, mean, mean_interval
from benchmark.storage.benchmark_records import (
    Answer,
    Difference,
    Metrics,
    PhaseCounts,
    ResultConfig,
    ResultIdentity,
    ResultRow,
    RunRecord,
    SampleCounts,
    SampleLine,
    Score,
    Summary,
)
from benchmark.storage.records import SPENT, AttentionRecord, Failure, parse_record, shared_fields, to_json, write_record
from benchmark.storage.results import environment, fingerprint, safe_name, write_text
from benchmark.storage.tables import table_text
from benchmark.tasks.base import Sample
from sparse_attention_hub.micro_metrics import expand_records
from sparse_attention_hub.models.prompts import without_thinking

logger = logging.getLogger("benchmark.phase2")

#: Columns after the data's own and the metrics'.
OWN_COLUMNS = ("reference_nll", "density", "error", "seconds", "status")
#: Figures of an answer whose means are in metrics.json.
MEANS = ("reference_nll", "density", "error", "kv_fraction", "model_kv_fraction", "seconds")


@dataclass
class Row:
    """One sample under one configuration. status: ok, failed, timeout, unscored (a metric raised) or missing. line: of the
    journal, without answers."""

    sample_id: str
    status: str
    answer: Answer | None = None
    line: SampleLine | None = None
    scores: dict[str, float] = field(default_factory=dict)
    problem: str | None = None
    only_thinking: bool = False  # the answer never left its thinking

    @property
    def given(self) -> Answer | None:
        """The answer; None where there is a failure or nothing in its place."""
        return self.answer if self.status in ("ok", "unscored") else None

    def figure(self, name: str) -> float | None:
        """A measured figure of the answer; None if it is missing."""
        value = getattr(self.given, name, None)
        return float(value) if value is not None else None


@dataclass
class UnitResults:
    """What became of a unit, for the summary. notes: for the user."""

    rows: list[ResultRow] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def result_folder(base: Path, unit: BenchmarkUnit, config: SparseConfig) -> Path:
    return base / safe_name(unit.model) / safe_name(config.name) / safe_name(unit.task)


def write_unit(run: UnitRun, config_run: str | None) -> UnitResults:
    """Score all configurations of a unit and write their files."""
    written = UnitResults()
    rows_of = {config.name: score_rows(run, config) for config in run.unit.configs}
    dense = next((rows_of[config.name] for config in run.unit.configs if config.config is None), None)
    for config in run.unit.configs:
        rows = rows_of[config.name]
        names = {"model": run.unit.model, "task": run.unit.task, "configuration": config.name}
        if all(row.status == "missing" for row in rows):  # there is nothing to write: earlier files stay
            if run.settings.rescore:
                missing = Failure(status="missing", problem="no recorded answers to score again")
                written.failures.append(missing.model_copy(update=names))
            continue
        metrics = make_metrics(run, config, rows, dense if config.config is not None else None)
        folder = result_folder(run.settings.benchmark_results_dir, run.unit, config)
        made_of = make_config(run, config, rows, config_run)
        if note := _move_aside(folder, made_of):
            written.notes.append(f"{run.name} {config.name}: {note}")
        ran = {f"{row.line.dtype} on {row.line.dense_backend}" for row in rows if row.line and row.line.dtype}
        if len(ran) > 1:  # "auto" was another one on another machine
            written.notes.append(f"{run.name} {config.name}: some answers are {', others '.join(sorted(ran))}: give --dtype")
        write_text(folder / "raw_results.csv", raw_csv(run, rows))
        if config.config is not None:
            write_text(folder / "micro_metrics.jsonl", _micro_lines(run, config))
        write_record(folder / "config.json", made_of)
        write_record(folder / "metrics.json", metrics)
        found = run.unit.provenance.get(config.name)
        written.rows.append(
            ResultRow(
                **{name: getattr(metrics, name) for name in metrics.model_fields_set - {"failures"}},
                folder=str(folder.relative_to(run.settings.benchmark_results_dir)),
                meets_budget=None if found is None else found.meets_budget,
                provenance=found,
            )
        )
        written.failures += [failure.model_copy(update=names) for failure in metrics.failures]
    return written


def score_rows(run: UnitRun, config: SparseConfig) -> list[Row]:
    """The samples' rows in order, scored. If a metric raises, the sample is marked and its answer is kept."""
    key = run.keys[config.name]
    rows = []
    for sample, digest in zip(run.samples, run.hashes, strict=True):
        found = run.store.find(digest, key)
        if found is None:
            rows.append(Row(sample.sample_id, "missing", problem="not answered yet"))
            continue
        answer = found.answer
        row = Row(sample.sample_id, answer.status, answer, run.store.lines.get(digest), problem=answer.error_message)
        if answer.ok:
            try:
                if answer.predicted_answer is None:
                    raise ValueError("the journal line has no predicted_answer")
                text = without_thinking(answer.predicted_answer, run.opens_thinking)
                row.only_thinking = text is None
                row.scores = _checked(run.task.score(text or "", sample))
            except Exception as error:
                row.status, row.problem = "unscored", error_message(error)
                logger.warning("%s %s: the metric failed: %s", config.name, sample.sample_id, row.problem)
        rows.append(row)
    return rows


def _checked(scores: dict[str, float]) -> dict[str, float]:
    bad = {name: value for name, value in scores.items() if not math.isfinite(value)}
    if bad:
        raise ValueError(f"scores must be finite, got {bad}")
    return {name: float(value) for name, value in scores.items()}


def make_metrics(run: UnitRun, config: SparseConfig, rows: list[Row], dense: list[Row] | None) -> Metrics:
    """The content of metrics.json. Failed samples are counted but left out of all means."""
    primary = run.task.metric
    scored = [row for row in rows if row.status == "ok"]
    scores: dict[str, Score] = {}
    for name in _metric_names(rows):
        values = [row.scores[name] for row in scored if name in row.scores]
        scores[name] = Score(mean=mean(values), interval=_interval(values), n=len(values))
    means: dict[str, Any] = {name: _mean_of(rows, name) for name in MEANS}
    nll, spent = _mean_of(rows, "reference_nll"), _mean_of(rows, SPENT[run.settings.budget_on])
    own = scores.get(primary, Score(mean=None, interval=None, n=0))
    metrics = Metrics(
        model=run.unit.model,
        task=run.unit.task,
        configuration=config.name,
        metric=primary,
        score=own.mean,
        interval=own.interval,
        scores=scores,
        perplexity=math.exp(nll) if nll is not None and nll < 700 else None,
        layers=next((row.line.layers for row in rows if row.line and row.line.layers), None),
        sparse_layers=next((row.line.sparse_layers for row in rows if row.line and row.line.sparse_layers), None),
        budget=config.budget,
        budget_on=run.settings.budget_on,
        over_budget=None if config.budget is None or spent is None else spent > config.budget * BUDGET_SLACK,
        samples=_counts(rows),
        **means,
        failures=[
            Failure(sample_id=row.sample_id, status=row.status, problem=row.problem)
            for row in rows
            if row.status not in ("ok", "missing")
        ],
    )
    if dense is not None:
        metrics.difference_to_dense = _difference(rows, dense, primary)
        metrics.reference_nll_difference_to_dense = _difference(rows, dense, "reference_nll")
    samples = {sample.sample_id: sample for sample in run.samples}
    try:
        extra = run.task.aggregate([row.scores for row in scored], [samples[row.sample_id] for row in scored])
    except Exception as error:
        metrics.aggregate_problem = error_message(error)
        logger.warning("%s %s: aggregating failed: %s", config.name, run.unit.task, metrics.aggregate_problem)
    else:
        if extra:
            metrics.aggregate = {str(name): _as_json(value) for name, value in extra.items()}
    return metrics


def _difference(rows: list[Row], dense: list[Row], name: str) -> Difference | None:
    def values(of: list[Row]) -> dict[str, float]:
        if name == "reference_nll":
            pairs = {row.sample_id: row.figure(name) for row in of}
        else:
            pairs = {row.sample_id: row.scores.get(name) if row.status == "ok" else None for row in of}
        return {sample: value for sample, value in pairs.items() if value is not None}

    own, others = values(rows), values(dense)
    bounded = name != "reference_nll" and all(0 <= value <= 1 for value in [*own.values(), *others.values()])
    return compare_paired(own, others, bounded=bounded)


def _interval(values: list[float]) -> tuple[float, float] | None:
    """None without values, or for a metric of a user's that leaves 0..1."""
    return mean_interval(values) if values and all(0 <= value <= 1 for value in values) else None


def _counts(rows: list[Row]) -> SampleCounts:
    answers = [(row.given, row.line) for row in rows if row.given is not None]
    count = Counter(row.status for row in rows)
    thinking = sum(row.only_thinking for row in rows)
    counts = SampleCounts(
        total=len(rows),
        ok=count["ok"],
        failed=count["failed"] + count["timeout"] + count["unscored"],
        timed_out=count["timeout"],
        unscored=count["unscored"],
        missing=count["missing"],
        # cut short by --max-new-tokens below the task's own length
        capped=sum(line is not None and line.capped_limit and answer.stopped == "length" for answer, line in answers),
        truncated=sum(line is not None and line.truncated_tokens > 0 for _, line in answers),
        without_reference_nll=sum(answer.reference_nll is None for answer, _ in answers),
    )
    if thinking:
        counts.never_left_thinking = thinking
    return counts


def _mean_of(rows: list[Row], name: str) -> float | None:
    return mean([value for row in rows if (value := row.figure(name)) is not None])


def _metric_names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.scores))


def raw_csv(run: UnitRun, rows: list[Row]) -> str:
    """One line per sample: the data's columns, the answer, the metrics, the measured figures."""
    metrics = _metric_names(rows)
    data = list(dict.fromkeys(name for sample in run.samples for name in sample.columns))
    taken = {"predicted_answer", *metrics, *OWN_COLUMNS}
    header = [f"data_{name}" if name in taken else name for name in data]
    lines = [
        [
            *(sample.columns.get(name) for name in data),
            row.answer and row.answer.predicted_answer,
            *(row.scores.get(name) for name in metrics),
            *(row.figure(name) for name in OWN_COLUMNS[:-1]),
            row.status,
        ]
        for sample, row in zip(run.samples, rows, strict=True)
    ]
    return table_text([*header, "predicted_answer", *metrics, *OWN_COLUMNS], lines)


def make_config(run: UnitRun, config: SparseConfig, rows: list[Row], config_run: str | None) -> ResultConfig:
    """The content of config.json; docs/file_formats.md explains the fields."""
    found = run.unit.provenance.get(config.name)
    ran = next((row.line for row in rows if row.line is not None and row.line.dtype), None)
    own = {
        "model": run.unit.model,
        "task": run.unit.task,
        "configuration": config.name,
        "sparse_config": None if config.config is None else AttentionRecord.model_validate(_as_json(config.config.to_dict())),
        "masker_classes": [entry.__name__ for entry in config.masker_classes or ()] or None,
        "budget": config.budget,
        "hash": answers_hash(run, config),
        "samples_hash": fingerprint(run.hashes),
        "samples": [_content(sample, digest) for sample, digest in zip(run.samples, run.hashes, strict=True)],
        "settings": to_json(run.shared),
        "dtype": None if ran is None else ran.dtype,
        "device": None if ran is None else str(ran.device).partition(":")[0],
        "dense_backend": None if ran is None else ran.dense_backend,
        "config_run": config_run if found is None else found.config_run,
        "provenance": found,
        "versions": environment(),
    }
    return ResultConfig(**shared_fields(ResultConfig, run.settings) | own)


def answers_hash(run: UnitRun, config: SparseConfig) -> str:
    """Of the settings, the answers' lengths and the configuration; the number of samples does not count."""
    return fingerprint([to_json(run.shared), sorted(set(run.limits)), run.keys[config.name]])


def _content(sample: Sample, digest: str) -> str:
    """A hash of all that an answer and its scores depend on."""
    return fingerprint([digest, sample.references, sample.label, sample.all_classes, sample.columns])


def _move_aside(folder: Path, made_of: ResultConfig) -> str | None:
    """Rename the folder of earlier results with other settings, data or prompts, so that they are kept. More or fewer of the
    same samples are the same results. Returns a note."""
    if not (folder / "config.json").exists() and not (folder / "metrics.json").exists():
        return None  # no results, or files of a run that ended while it wrote them
    try:
        before = parse_record((folder / "config.json").read_bytes(), ResultIdentity)
    except (OSError, ValueError):
        before = ResultIdentity(hash="unknown")
    same_samples = all(old == new for old, new in zip(before.samples, made_of.samples, strict=False))
    if before.hash == made_of.hash and same_samples:
        return None
    aside = folder.with_name(f"{folder.name}.{fingerprint([before.hash, before.samples])[:8]}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return f"earlier results of other {'data or prompts' if before.hash == made_of.hash else 'settings'} are now in {aside}"


def _micro_lines(run: UnitRun, config: SparseConfig) -> str:
    lines = []
    for sample, digest in zip(run.samples, run.hashes, strict=True):
        calls = run.store.micro(digest, run.keys[config.name])
        lines += [json.dumps(record) + "\n" for record in expand_records(calls, sample.sample_id)]
    return "".join(lines)


def _as_json(value: Any) -> Any:
    """Plain JSON values. NaN and infinity, which JSON does not have, become null: a figure that could not be computed."""
    if isinstance(value, dict):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    if hasattr(value, "tolist"):  # NumPy
        return _as_json(value.tolist())
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_summary(
    runs: list[UnitRun],
    written: dict[str, UnitResults],
    settings: Settings,
    config_run: str | None,
    notes: list[str],
    interrupted: bool,
    search_failures: list[Failure],
) -> Summary:
    """The content of benchmark_summary.json, in the order of the runs. written: run name -> results, of the finished runs."""
    finished = [written[run.name] for run in runs if run.name in written]
    results = [row for entry in finished for row in entry.rows]
    broken = [run for run in runs if run.error]
    failures = search_failures + [failure for entry in finished for failure in entry.failures]
    failures += [
        Failure(model=run.unit.model, task=run.unit.task, configuration=None, status="failed", problem=run.error)
        for run in broken
    ]
    planned, lost = sum(len(run.unit.configs) for run in runs), sum(len(run.unit.configs) for run in broken)
    asked = {
        "models": list(dict.fromkeys(run.unit.model for run in runs)),
        "tasks": list(dict.fromkeys(run.unit.task for run in runs)),
        "num_sparse_configs": len({c.name for run in runs for c in run.unit.configs if c.config is not None}),
        "objective_function": settings.objective,
    }
    whole = sum(row.samples.ok == row.samples.total for row in results)
    empty = sum(row.samples.ok == 0 for row in results)
    return Summary(
        timestamp=datetime.now().astimezone().isoformat(timespec="seconds"),
        config_run_used=config_run,
        objective_function=settings.objective,
        interrupted=interrupted,
        phase2_results=PhaseCounts(
            total=planned,
            completed=whole,
            partial=len(results) - whole - empty,
            failed=lost + empty,
            skipped=planned - len(results) - lost,
        ),
        results=results,
        failures=failures,
        notes=notes,
        configuration=RunRecord(**shared_fields(RunRecord, settings) | asked),
        versions=environment(),
    )
