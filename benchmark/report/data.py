"""A results folder read for its report: one row per (model, task, configuration), and the configuration to use at a budget."""

from __future__ import annotations

import csv
import math
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmark.settings import DENSE, SparseConfig
from benchmark.stats import Comparison, compare_paired
from benchmark.storage.records import Failure, Metrics, ResultConfig, SampleCounts, Summary, read_record
from benchmark.storage.results import safe_name
from sparse_attention_hub.errors import UserError

#: A row fits a budget if its measured density exceeds it by at most a tenth, as for the marks of Phase 2.
BUDGET_SLACK = 1.1
#: A method saves reads at a budget if it reads at most this many times the budget in bytes, selector included.
BYTES_SLACK = 2.0
_ADVICE = "left out; run Phase 2 again"
#: The suffix of folders that Phase 2 moved aside for results of other settings or data.
_MOVED_ASIDE = re.compile(r"\.[0-9a-f]{8}$")


@dataclass(frozen=True)
class ResultRow:
    """The results of one configuration on one task. metrics, config: its two JSON files."""

    folder: Path
    metrics: Metrics
    config: ResultConfig

    @property
    def name(self) -> str:
        return self.metrics.configuration

    @property
    def is_dense(self) -> bool:
        return self.config.sparse_config is None

    @property
    def family(self) -> str:
        return SparseConfig(self.name, None, None).family

    @property
    def budget(self) -> float | None:
        return self.metrics.budget

    @property
    def samples(self) -> SampleCounts:
        return self.metrics.samples

    @property
    def engine(self) -> str:
        """Version of the engine that answered; 1 where a file does not say it."""
        return self.config.versions.get("engine") or "1"

    @property
    def basis(self) -> tuple[str, str]:
        """What rows must share to be compared: the samples and the engine's version."""
        return self.config.samples_hash, self.engine

    @property
    def key(self) -> tuple[str, str, str]:
        """What comparable rows have in common: model, task, protocol."""
        return self.metrics.model, self.metrics.task, self.config.sparse_from

    def figure(self, name: str) -> float | None:
        value: float | None = getattr(self.metrics, name)
        return value

    def sample_scores(self) -> dict[str, float]:
        """Scores of the answered samples, by their line in raw_results.csv. Lines of rows with equal `samples_hash` agree."""
        return _column(self.folder / "raw_results.csv", self.metrics.metric)

    def meets_budget(self) -> bool | None:
        """Whether the search met the budget; None if unknown."""
        return None if self.config.provenance is None else self.config.provenance.meets_budget


@dataclass
class Group:
    """The rows of one (model, task, protocol). others: rows on other samples or of another engine version, which
    are compared with nothing."""

    model: str
    task: str
    sparse_from: str
    rows: list[ResultRow]
    others: list[ResultRow] = field(default_factory=list)

    def what_differs(self, other: ResultRow) -> str:
        """Why a row of `others` is compared with nothing."""
        same_samples = other.config.samples_hash == self.rows[0].config.samples_hash
        return f"engine version {other.engine}" if same_samples else "other samples"

    @property
    def dense(self) -> ResultRow | None:
        return next((row for row in self.rows if row.is_dense), None)

    @property
    def budgets(self) -> list[float]:
        return sorted({row.budget for row in self.rows if row.budget is not None})


@dataclass(frozen=True)
class Choice:
    """What to use at a budget. runner_up: the next best, and the paired difference best - runner_up on the same samples;
    light: the best of the rows that read few bytes, if `best` reads many."""

    budget: float
    best: ResultRow
    runner_up: ResultRow | None
    margin: Comparison | None
    light: ResultRow | None


@dataclass
class Tree:
    """A results folder. summary: None without a readable one; damaged: one line per file that could not be read."""

    folder: Path
    groups: list[Group]
    summary: Summary | None
    damaged: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[ResultRow]:
        return [row for group in self.groups for row in [*group.rows, *group.others]]

    def failures(self) -> list[Failure]:
        """The failures of all rows, and those of the last run that belong to no row."""
        found = [
            failure.model_copy(update={"model": row.metrics.model, "task": row.metrics.task, "configuration": row.name})
            for row in self.rows
            for failure in row.metrics.failures
        ]
        return found + [failure for failure in (self.summary.failures if self.summary else []) if failure.configuration is None]


@dataclass(frozen=True)
class Pair:
    """A (model, task, protocol, configuration) in two results folders. comparison: the paired difference b - a, None unless
    both answered the same samples; changed: settings that differ."""

    key: tuple[str, str, str, str]
    a: ResultRow | None
    b: ResultRow | None
    comparison: Comparison | None
    changed: list[str]


def read_tree(folder: Path) -> Tree:
    """Read all results in a folder. Damaged results are left out and named in `Tree.damaged`; UserError if none is left."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a benchmark results folder")
    groups: dict[tuple[str, str, str], Group] = {}
    damaged: list[str] = []
    for path in sorted(folder.glob("*/*/*/metrics.json")):
        if _MOVED_ASIDE.search(path.parent.name):
            continue
        try:
            row = _read_row(path.parent)
        except UserError as error:
            damaged.append(str(error))
            continue
        if path.parent.name == safe_name(row.metrics.task):  # else a copy that somebody renamed
            groups.setdefault(row.key, Group(*row.key, [])).rows.append(row)
    if damaged and not groups:
        raise UserError(f"{damaged[0]} ({folder} holds no other results)")
    if not groups:
        raise UserError(f"{folder}: holds no results (no <model>/<configuration>/<task>/metrics.json); run --phase 2 first")
    for group in groups.values():
        group.rows.sort(key=lambda row: (not row.is_dense, row.family, row.budget or 0.0, row.name))
        common = Counter(row.basis for row in group.rows).most_common(1)[0][0]
        basis = group.dense.basis if group.dense else common
        group.others = [row for row in group.rows if row.basis != basis]
        group.rows = [row for row in group.rows if row.basis == basis]
    summary, path = None, folder / "benchmark_summary.json"
    if path.exists():
        try:
            summary = read_record(path, Summary, _ADVICE)
        except UserError as error:
            damaged.append(str(error))
    return Tree(folder, [groups[key] for key in sorted(groups)], summary, damaged)


def choose(group: Group, budget: float) -> Choice | None:
    """The row to use at a budget: of the sparse rows whose measured density fits it, the one with the best score, then the
    smallest reference_nll, then the lowest density. None if no row fits."""
    fits = sorted((row for row in group.rows if _fits(row, budget)), key=_preference)
    if not fits:
        return None
    best, runner_up = fits[0], fits[1] if len(fits) > 1 else None
    margin = compare_paired(best.sample_scores(), runner_up.sample_scores()) if runner_up else None
    light = None if _is_light(best, budget) else next((row for row in fits if _is_light(row, budget)), None)
    return Choice(budget, best, runner_up, margin, light)


def run_again(rows: list[ResultRow]) -> str:
    """The command that benchmarks these rows of one (model, task) again, dense beside them."""
    first = rows[0].config
    words = ["python", "benchmark/raytune/run_full_benchmark.py", "--phase", "2"]
    run = next((row.config.config_run for row in rows if row.config.config_run), None)
    words += ["--config-run", run] if run else []
    words += ["--models", first.model, "--tasks", *dict.fromkeys(row.config.task for row in rows)]
    words += ["--configs", *dict.fromkeys([DENSE, *(row.name for row in rows)])]
    words += ["--seed", str(first.seed), "--sparse-from", first.sparse_from]
    words += ["--max-new-tokens", str(first.max_new_tokens), "--max-context-length", str(first.max_context_length)]
    words += ["--max-requests", str(first.max_requests)] if first.max_requests is not None else []
    words += ["--dtype", first.dtype] if first.dtype in ("float32", "bfloat16", "float16") else []
    return shlex.join(words)


def compare_trees(first: Tree, second: Tree) -> list[Pair]:
    """One pair for each (model, task, protocol, configuration) of either folder."""
    rows_a, rows_b = ({(*row.key, row.name): row for row in tree.rows} for tree in (first, second))
    pairs = []
    for key in dict.fromkeys([*rows_a, *rows_b]):
        a, b = rows_a.get(key), rows_b.get(key)
        comparison, changed = None, []
        if a and b:
            changed = [name for name in _SETTINGS if getattr(a.config, name) != getattr(b.config, name)]
            if a.basis == b.basis:
                comparison = compare_paired(b.sample_scores(), a.sample_scores())
        pairs.append(Pair(key, a, b, comparison, changed))
    return pairs


_SETTINGS = (
    "sparse_config", "seed", "dtype", "device", "dense_backend", "attention_backend", "max_new_tokens", "max_context_length",
    "samples_hash", "config_run", "versions",
)  # fmt: skip


def _fits(row: ResultRow, budget: float) -> bool:
    density = row.metrics.density
    return not row.is_dense and row.metrics.score is not None and density is not None and density <= BUDGET_SLACK * budget


def _preference(row: ResultRow) -> tuple[float, float, float]:
    nll, density = row.metrics.reference_nll, row.metrics.density
    return (-(row.metrics.score or 0.0), math.inf if nll is None else nll, 1.0 if density is None else density)


def _is_light(row: ResultRow, budget: float) -> bool:
    read = row.metrics.kv_fraction
    return read is not None and read <= BYTES_SLACK * budget


def _read_row(folder: Path) -> ResultRow:
    metrics = read_record(folder / "metrics.json", Metrics, _ADVICE)
    row = ResultRow(folder, metrics, read_record(folder / "config.json", ResultConfig, _ADVICE))
    if not (folder / "raw_results.csv").is_file():
        raise UserError(f"{folder / 'raw_results.csv'}: no such file; {_ADVICE}")
    return row


def _column(path: Path, name: str) -> dict[str, float]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # contexts are long
    scores = {}
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream)):
                if row.get("status") == "ok" and row.get(name):
                    score = scores[f"{number:09d}"] = float(row[name])
                    if not math.isfinite(score):
                        raise ValueError(f"{name} of line {number + 1} must be finite, got {score}")
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); run Phase 2 again") from None
    return scores
