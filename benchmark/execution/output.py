"""The files of one configuration on one task, made from the journals: raw_results.csv, metrics.json, config.json and
micro_metrics.jsonl. Everything is written whole; scoring happens here, so that answers outlive any metric."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import shutil
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmark.execution.jobs import UnitRun
from benchmark.settings import Settings, SparseConfig
from benchmark.stats import bootstrap_interval, compare_paired, mean
from benchmark.storage.results import environment, fingerprint, safe_name, write_json, write_text
from benchmark.tasks.base import Sample
from sparse_attention_hub.micro_metrics import expand_records

logger = logging.getLogger("benchmark.phase2")

#: Columns after the data's own and the metrics'.
OWN_COLUMNS = ("reference_nll", "density", "error", "seconds", "status")
#: How much more than its budget a configuration may read before its row is marked.
BUDGET_SLACK = 1.1


@dataclass
class Row:
    """One sample under one configuration. status: ok, failed, timeout, unscored (a metric raised) or missing."""

    sample_id: str
    status: str
    answer: dict[str, Any] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    problem: str | None = None

    def figure(self, name: str) -> float | None:
        """A measured figure of an answered sample; None if it is missing."""
        value = self.answer.get(name) if self.status in ("ok", "unscored") else None
        return float(value) if value is not None else None


def result_folder(run: UnitRun, config: SparseConfig) -> Path:
    base = run.settings.benchmark_results_dir
    return base / safe_name(run.unit.model) / safe_name(config.name) / safe_name(run.unit.task)


def write_unit(run: UnitRun, config_run: str | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Score and write all configurations of a unit. Returns the summary's rows, the failures, and notes worth
    telling."""
    results: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    notes: list[str] = []
    rows_of = {config.name: score_rows(run, config) for config in run.unit.configs}
    dense = next((rows_of[config.name] for config in run.unit.configs if config.config is None), None)
    for config in run.unit.configs:
        rows = rows_of[config.name]
        if all(row.status == "missing" for row in rows):  # there is nothing to write: earlier files stay
            if run.settings.rescore:
                problem = "no recorded answers to score again"
                failures.append(_failure(run, config, {"status": "missing", "problem": problem}))
            continue
        metrics = make_metrics(run, config, rows, dense if config.config is not None else None)
        folder = result_folder(run, config)
        told = make_config(run, config, rows, config_run)
        if note := _move_aside(folder, told):
            notes.append(f"{run.name} {config.name}: {note}")
        write_text(folder / "raw_results.csv", raw_csv(run, rows))
        if config.config is not None:
            write_text(folder / "micro_metrics.jsonl", _micro_lines(run, config))
        write_json(folder / "config.json", told)
        write_json(folder / "metrics.json", metrics)
        results.append({**metrics, "folder": str(folder.relative_to(run.settings.benchmark_results_dir))})
        failures += [_failure(run, config, entry) for entry in metrics["failures"]]
    return results, failures, notes


def _failure(run: UnitRun, config: SparseConfig, entry: dict[str, Any]) -> dict[str, Any]:
    return {"model": run.unit.model, "task": run.unit.task, "configuration": config.name, **entry}


def score_rows(run: UnitRun, config: SparseConfig) -> list[Row]:
    """The samples' rows in order, scored. A metric that raises marks its sample and the answer stays."""
    key = run.keys[config.name]
    rows = []
    for sample, digest in zip(run.samples, run.hashes, strict=True):
        answer = run.store.answer(sample.sample_id, digest, key)
        if answer is None:
            rows.append(Row(sample.sample_id, "missing", problem="not answered yet"))
            continue
        row = Row(sample.sample_id, answer["status"], answer, run.store.details.get((sample.sample_id, digest), {}))
        row.problem = answer.get("error_message")
        if row.status == "ok":
            try:
                row.scores = _checked(run.task.score(answer["predicted_answer"], sample))
            except Exception as error:
                row.status, row.problem = "unscored", f"{type(error).__name__}: {error}"[:500]
                logger.warning("%s %s: the metric failed: %s", config.name, sample.sample_id, row.problem)
        rows.append(row)
    return rows


def _checked(scores: dict[str, float]) -> dict[str, float]:
    bad = {name: value for name, value in scores.items() if not math.isfinite(value)}
    if bad:
        raise ValueError(f"scores must be finite, got {bad}")
    return {name: float(value) for name, value in scores.items()}


def make_metrics(run: UnitRun, config: SparseConfig, rows: list[Row], dense: list[Row] | None) -> dict[str, Any]:
    """What metrics.json holds. Failed samples are in no mean and are counted."""
    primary = run.task.metric
    scored = [row for row in rows if row.status == "ok"]
    scores: dict[str, Any] = {}
    for name in _metric_names(rows):
        values = [row.scores[name] for row in scored if name in row.scores]
        scores[name] = {"mean": mean(values), "interval": bootstrap_interval(values), "n": len(values)}
    nll = _mean_of(rows, "reference_nll")
    density = _mean_of(rows, "density")
    own = scores.get(primary, {"mean": None, "interval": None, "n": 0})
    metrics: dict[str, Any] = {
        "model": run.unit.model,
        "task": run.unit.task,
        "configuration": config.name,
        "metric": primary,
        "score": own["mean"],
        "interval": own["interval"],
        "scores": scores,
        "reference_nll": nll,
        "perplexity": math.exp(nll) if nll is not None and nll < 700 else None,
        "density": density,
        "error": _mean_of(rows, "error"),
        "kv_fraction": _mean_of(rows, "kv_fraction"),
        "budget": config.budget,
        "over_budget": None if config.budget is None or density is None else density > config.budget * BUDGET_SLACK,
        "samples": _counts(rows),
        "seconds": _mean_of(rows, "seconds"),
        "failures": [
            {"sample_id": row.sample_id, "status": row.status, "problem": row.problem}
            for row in rows
            if row.status not in ("ok", "missing")
        ],
    }
    if dense is not None:
        metrics["difference_to_dense"] = _difference(rows, dense, primary)
        metrics["reference_nll_difference_to_dense"] = _difference(rows, dense, "reference_nll")
    samples = {sample.sample_id: sample for sample in run.samples}
    try:
        extra = run.task.aggregate([row.scores for row in scored], [samples[row.sample_id] for row in scored])
    except Exception as error:
        logger.warning("%s %s: aggregating failed: %s", config.name, run.unit.task, error)
        metrics["aggregate_problem"] = f"{type(error).__name__}: {error}"[:500]
    else:
        if extra:
            metrics["aggregate"] = _without_nan(extra)
    return metrics


def _difference(rows: list[Row], dense: list[Row], name: str) -> dict[str, Any] | None:
    def values(of: list[Row]) -> dict[str, float]:
        pairs = {row.sample_id: row.scores.get(name) if row.status == "ok" else None for row in of}
        if name == "reference_nll":
            pairs = {row.sample_id: row.figure(name) for row in of}
        return {sample: value for sample, value in pairs.items() if value is not None}

    found = compare_paired(values(rows), values(dense))
    return found.to_dict() if found is not None else None


def _counts(rows: list[Row]) -> dict[str, int]:
    answered = [row for row in rows if row.status in ("ok", "unscored")]
    return {
        "total": len(rows),
        "ok": sum(row.status == "ok" for row in rows),
        "failed": sum(row.status in ("failed", "timeout", "unscored") for row in rows),
        "timed_out": sum(row.status == "timeout" for row in rows),
        "unscored": sum(row.status == "unscored" for row in rows),
        "missing": sum(row.status == "missing" for row in rows),
        # cut short by --max-new-tokens below the task's own length
        "capped": sum(bool(row.detail.get("capped_limit")) and row.answer.get("stopped") == "length" for row in answered),
        "truncated": sum(bool(row.detail.get("truncated_tokens")) for row in answered),
        "without_reference_nll": sum(row.answer.get("reference_nll") is None for row in answered),
    }


def _mean_of(rows: list[Row], name: str) -> float | None:
    return mean([value for row in rows if (value := row.figure(name)) is not None])


def _metric_names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.scores))


def raw_csv(run: UnitRun, rows: list[Row]) -> str:
    """One line a sample, every field quoted as RFC 4180 has it: text comes back exactly, line breaks included. Lists
    and dictionaries are JSON; a missing value is empty."""
    metrics = _metric_names(rows)
    data = list(dict.fromkeys(name for sample in run.samples for name in sample.columns))
    taken = {"predicted_answer", *metrics, *OWN_COLUMNS}
    header = [f"data_{name}" if name in taken else name for name in data]
    stream = io.StringIO()
    writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow([*header, "predicted_answer", *metrics, *OWN_COLUMNS])
    for sample, row in zip(run.samples, rows, strict=True):
        writer.writerow(
            [
                *(_cell(sample.columns.get(name)) for name in data),
                _cell(row.answer.get("predicted_answer")),
                *(_cell(row.scores.get(name)) for name in metrics),
                *(_cell(row.figure(name)) for name in OWN_COLUMNS[:-1]),
                row.status,
            ]
        )
    return stream.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if hasattr(value, "tolist"):  # NumPy
        value = value.tolist()
    return json.dumps(value, ensure_ascii=False, default=str)


def make_config(run: UnitRun, config: SparseConfig, rows: list[Row], config_run: str | None) -> dict[str, Any]:
    """What config.json holds. hash: everything that determines an answer; samples_hash: which samples were asked; samples:
    what each was made of, the references and labels included."""
    details = [row.detail for row in rows if row.detail.get("dtype")]
    ran = details[0] if details else {}
    settings = run.settings
    return {
        "model": run.unit.model,
        "task": run.unit.task,
        "configuration": config.name,
        "sparse_config": None if config.config is None else config.config.to_dict(),
        "masker_classes": [entry.__name__ for entry in config.masker_classes or ()] or None,
        "budget": config.budget,
        "hash": answers_hash(run, config),
        "samples_hash": fingerprint(run.hashes),
        "samples": [_content(sample, digest) for sample, digest in zip(run.samples, run.hashes, strict=True)],
        "settings": run.shared,
        "sparse_from": settings.sparse_from,
        "seed": settings.seed,
        "dtype": ran.get("dtype"),
        "device": str(ran["device"]).partition(":")[0] if ran else None,
        "dense_backend": ran.get("dense_backend"),
        "attention_backend": settings.attention_backend,
        "max_new_tokens": settings.max_new_tokens,
        "max_context_length": settings.max_context_length,
        "max_requests": settings.max_requests,
        "micro_metrics": settings.micro_metrics,
        "config_run": config_run,
        "provenance": run.unit.provenance.get(config.name, {}),
        "versions": environment(),
    }


def answers_hash(run: UnitRun, config: SparseConfig) -> str:
    """Of the settings, the answers' lengths and the configuration: not of how many samples were asked for."""
    return fingerprint([run.shared, sorted(set(run.limits)), run.keys[config.name]])


def _content(sample: Sample, digest: str) -> str:
    """Of all that an answer and its scores depend on."""
    return fingerprint([digest, sample.references, sample.label, sample.all_classes, sample.columns])


def _move_aside(folder: Path, told: dict[str, Any]) -> str | None:
    """Results of other settings or other data keep their files: their folder is renamed before new ones are written. More
    or fewer of the same samples are the same results."""
    if not folder.exists():
        return None
    try:
        before = json.loads((folder / "config.json").read_text())
        settings, samples = str(before["hash"]), list(before.get("samples", []))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        if not any(folder.iterdir()):
            return None
        settings, samples = "unknown", []
    same_samples = all(old == new for old, new in zip(samples, told["samples"], strict=False))
    if settings == told["hash"] and same_samples:
        return None
    aside = folder.with_name(f"{folder.name}.{fingerprint([settings, samples])[:8]}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return f"earlier results of other {'data' if settings == told['hash'] else 'settings'} are now in {aside}"


def _micro_lines(run: UnitRun, config: SparseConfig) -> str:
    lines = []
    for sample, digest in zip(run.samples, run.hashes, strict=True):
        calls = run.store.micro(sample.sample_id, digest, run.keys[config.name])
        lines += [json.dumps(record) + "\n" for record in expand_records(calls, sample.sample_id)]
    return "".join(lines)


def _without_nan(value: Any) -> Any:
    """NaN and infinity are no JSON: a figure that could not be computed is null."""
    if isinstance(value, dict):
        return {str(key): _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def make_summary(
    runs: list[UnitRun],
    written: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]],
    settings: Settings,
    config_run: str | None,
    notes: list[str],
    interrupted: bool,
    earlier_failures: list[dict[str, Any]],
) -> dict[str, Any]:
    """What benchmark_summary.json holds, in the order of the runs, whatever order they were finished in. written: run
    name -> its results and failures, of the runs that are written; earlier_failures: the search's."""
    results = [entry for run in runs for entry in written.get(run.name, ([], []))[0]]
    failures = earlier_failures + [entry for run in runs for entry in written.get(run.name, ([], []))[1]]
    broken = [run for run in runs if run.error]
    failures += [
        {
            "model": run.unit.model,
            "task": run.unit.task,
            "configuration": None,
            "status": "failed",
            "problem": run.error,
        }
        for run in broken
    ]
    planned, lost = sum(len(run.unit.configs) for run in runs), sum(len(run.unit.configs) for run in broken)
    whole = sum(result["samples"]["ok"] == result["samples"]["total"] for result in results)
    empty = sum(result["samples"]["ok"] == 0 for result in results)
    return {
        "timestamp": datetime.now().astimezone().isoformat(timespec="seconds"),
        "config_run_used": config_run,
        "objective_function": settings.objective,
        "interrupted": interrupted,
        "phase2_results": {
            "total": planned,
            "completed": whole,
            "partial": len(results) - whole - empty,
            "failed": lost + empty,
            "skipped": planned - len(results) - lost,
        },
        "results": results,
        "failures": failures,
        "notes": notes,
        "configuration": {
            "models": list(dict.fromkeys(run.unit.model for run in runs)),
            "tasks": list(dict.fromkeys(run.unit.task for run in runs)),
            "num_sparse_configs": len({c.name for run in runs for c in run.unit.configs if c.config is not None}),
            "objective_function": settings.objective,
            "seed": settings.seed,
            "sparse_from": settings.sparse_from,
            "max_new_tokens": settings.max_new_tokens,
            "max_context_length": settings.max_context_length,
            "max_requests": settings.max_requests,
            "benchmark_timeout": settings.benchmark_timeout,
            "micro_metrics": settings.micro_metrics,
        },
        "versions": environment(),
    }
