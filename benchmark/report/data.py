"""A results folder read for its report: one row per (model, task, configuration), and the configuration to use at a budget."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import pandas as pd

from benchmark.settings import BUDGET_SLACK, DENSE, SparseConfig
from benchmark.stats import LEVEL, compare_paired, group_interval, mean_interval, sign_test
from benchmark.storage.benchmark_records import Difference, Metrics, ResultConfig, Summary
from benchmark.storage.records import SPENT, BudgetOn, Failure, Interval, read_record
from benchmark.storage.results import safe_name
from sparse_attention_hub.errors import UserError, quoted

#: A method saves reads at a budget if it reads at most this many times the budget in bytes, selector included.
BYTES_SLACK = 2.0
#: A row is recommended if it answered at least this share of the samples that the fullest row answered.
ENOUGH = 0.95
#: Those of configurations without --levels.
_USUAL_BUDGETS = {0.05, 0.1, 0.25, 0.5}
_ADVICE = "left out; run Phase 2 again"
#: The suffix of folders that Phase 2 moved aside for results of other settings or data.
_MOVED_ASIDE = re.compile(r"\.[0-9a-f]{8}$")


@dataclass(frozen=True)
class ResultRow:
    """The results of one configuration on one task. metrics, config: its two JSON files. scores: of the answered samples, by
    their row in raw_results.csv, which agrees between results with equal `samples_hash`."""

    folder: Path
    metrics: Metrics
    config: ResultConfig
    scores: dict[str, float]

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
    def engine(self) -> str:
        """Version of the engine that answered; 1 if a file does not contain it."""
        return self.config.versions.get("engine") or "1"

    @property
    def basis(self) -> tuple[str, ...]:
        """What rows of one report must share to be compared: samples, engine, weights, precision, seed."""
        settings = self.config.settings
        return (
            self.config.samples_hash,
            self.engine,
            str(settings.get("weights")),
            str(settings.get("dtype")),
            str(self.config.seed),
        )

    @property
    def key(self) -> tuple[str, str, str]:
        """What comparable rows have in common: model, task, protocol."""
        return self.metrics.model, self.metrics.task, self.config.sparse_from

    @property
    def meets_budget(self) -> bool | None:
        """Whether the search met the budget; None if unknown."""
        return None if self.config.provenance is None else self.config.provenance.meets_budget

    @property
    def spent(self) -> float | None:
        """What its budget is on: the measured density, or the share of the KV bytes."""
        spent: float | None = getattr(self.metrics, SPENT[self.metrics.budget_on])
        return spent

    def fits(self, budget: float) -> bool:
        return not self.is_dense and bool(self.scores) and self.spent is not None and self.spent <= BUDGET_SLACK * budget

    def saves_reads(self, budget: float) -> bool:
        """Whether it reads few bytes of the layers where it is sparse. An oracle never does: it knows all scores."""
        maskers = self.config.sparse_config.masker_configs if self.config.sparse_config else []
        read = self.metrics.kv_fraction
        return read is not None and read <= BYTES_SLACK * budget and not any(m.type.startswith("Oracle") for m in maskers)


@dataclass
class Group:
    """The rows of one (model, task, protocol), whose budgets are all on one thing (--budget-on). others: rows on other
    samples, of other weights and so on (`ResultRow.basis`), which are compared with nothing."""

    model: str
    task: str
    sparse_from: str
    rows: list[ResultRow]
    others: list[ResultRow] = field(default_factory=list)
    budget_on: BudgetOn = "density"

    def what_differs(self, other: ResultRow) -> str:
        """Why a row of `others` is compared with nothing."""
        _, engine, _, dtype, seed = other.basis
        names = ("other samples", f"engine version {engine}", "other weights", f"dtype {dtype}", f"seed {seed}")
        return next(name for name, a, b in zip(names, other.basis, self.rows[0].basis, strict=True) if a != b)

    @property
    def dense(self) -> ResultRow | None:
        return next((row for row in self.rows if row.is_dense), None)

    @property
    def budgets(self) -> list[float]:
        return sorted({row.metrics.budget for row in self.rows if row.metrics.budget is not None})

    @property
    def dense_failure(self) -> str | None:
        """Why this task says nothing about sparse attention: dense attention itself fails it. None otherwise."""
        if self.dense is None:
            return None
        scores = list(self.dense.scores.values())
        above = sum(score > 0 for score in scores)
        if above > 1 or (above == 1 and len(scores) < 4):
            return None
        return f"dense attention scores above 0 on {above} of {self.dense.metrics.samples.total} samples"


@dataclass(frozen=True)
class Pick:
    """The best of some rows. candidates: their number. interval, to_dense: of its score and of the difference to dense, with
    intervals that hold for all candidates at once (Bonferroni): the same samples made the choice."""

    row: ResultRow
    candidates: int
    interval: Interval | None
    to_dense: Difference | None


@dataclass(frozen=True)
class Choice:
    """What to use at a budget. best: of the rows that save reads, None without any; runner_up: the next of these, and the
    paired difference best - runner_up on the same samples. ceiling: the best of all rows, if it is another one."""

    budget: float
    best: Pick | None
    runner_up: ResultRow | None
    margin: Difference | None
    ceiling: Pick | None


@dataclass(frozen=True)
class GroupMean:
    """The mean score of a configuration over the tasks of a group such as ruler/4096; every task counts alike. tasks: those
    that were run. score: None if the configuration has none on `missing`. to_dense: n, better, worse count tasks."""

    model: str
    group: str
    sparse_from: str
    configuration: str
    tasks: list[str]
    missing: list[str]
    score: float | None = None
    interval: Interval | None = None
    to_dense: Difference | None = None


@dataclass
class Tree:
    """A results folder. summary: None without a readable one; damaged: one line per file that could not be read."""

    folder: Path
    groups: list[Group]
    summary: Summary | None
    damaged: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[ResultRow]:
        rows = {id(row): row for group in self.groups for row in [*group.rows, *group.others]}  # groups may share a dense row
        return list(rows.values())

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
    comparison: Difference | None
    changed: list[str]


def read_tree(folder: Path) -> Tree:
    """Read all results in a folder. Damaged results are left out and named in `Tree.damaged`; UserError if none is left."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a benchmark results folder")
    groups: dict[tuple[str, ...], Group] = {}
    dense: list[ResultRow] = []
    damaged: list[str] = []
    for path in sorted(folder.glob("*/*/*/metrics.json")):
        if _MOVED_ASIDE.search(path.parent.name):
            continue
        try:
            row = _read_row(path.parent)
        except UserError as error:
            damaged.append(str(error))
            continue
        if path.parent.name != safe_name(row.metrics.task):  # a copy that somebody renamed
            continue
        if row.is_dense:
            dense.append(row)
        else:
            on = row.metrics.budget_on
            groups.setdefault((*row.key, on), Group(*row.key, [], budget_on=on)).rows.append(row)
    for row in dense:
        own = [group for key, group in groups.items() if key[:3] == row.key]
        for group in own or [groups.setdefault(row.key, Group(*row.key, []))]:
            group.rows.append(row)
    if damaged and not groups:
        raise UserError(f"{damaged[0]} ({folder} holds no other results)")
    if not groups:
        raise UserError(f"{folder}: holds no results (no <model>/<configuration>/<task>/metrics.json); run --phase 2 first")
    for group in groups.values():
        group.rows.sort(key=lambda row: (not row.is_dense, row.family, row.metrics.budget or 0.0, row.name))
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


def _read_row(folder: Path) -> ResultRow:
    metrics = read_record(folder / "metrics.json", Metrics, _ADVICE)
    config = read_record(folder / "config.json", ResultConfig, _ADVICE)
    return ResultRow(folder, metrics, config, _read_scores(folder / "raw_results.csv", metrics.metric))


def _read_scores(path: Path, metric: str) -> dict[str, float]:
    try:
        columns = ("status", metric)
        table = pd.read_csv(path, usecols=lambda name: name in columns, index_col=False, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({quoted(error)}); {_ADVICE}") from None
    if not set(columns) <= set(table.columns):  # no sample has a score
        return {}
    scores = {}
    for number, (status, text) in enumerate(zip(table["status"], table[metric], strict=True)):
        if status == "ok" and text:
            try:
                scores[f"{number:09d}"] = float(text)
            except ValueError:
                scores[f"{number:09d}"] = math.nan
            if not math.isfinite(scores[f"{number:09d}"]):
                raise UserError(f"{path}: {metric} of sample {number + 1} must be a number, got {quoted(text)}; {_ADVICE}")
    return scores


def choose(group: Group, budget: float) -> Choice | None:
    """What to use at a budget, of the sparse rows whose measured density fits it and that answered nearly as many samples as the
    fullest of them (failures may be the hardest samples): the best score wins, then the smallest
    reference_nll, then the lowest density. None if no row fits."""
    fits = [row for row in group.rows if row.fits(budget)]
    if not fits:
        return None
    most = max(len(row.scores) for row in fits)
    fits = sorted((row for row in fits if len(row.scores) >= ENOUGH * most), key=_preference)
    light = [row for row in fits if row.saves_reads(budget)]
    runner_up = light[1] if len(light) > 1 else None
    margin = compare_paired(light[0].scores, runner_up.scores, level=_shared_level(light)) if runner_up else None
    ceiling = _pick(fits, group.dense) if fits[:1] != light[:1] else None
    return Choice(budget, _pick(light, group.dense), runner_up, margin, ceiling)


def _pick(rows: list[ResultRow], dense: ResultRow | None) -> Pick | None:
    """rows: best first."""
    if not rows:
        return None
    best, level = rows[0], _shared_level(rows)
    to_dense = compare_paired(best.scores, dense.scores, bounded=_bounded(best, dense), level=level) if dense else None
    interval = mean_interval(list(best.scores.values()), level=level) if _bounded(best) else None
    return Pick(best, len(rows), interval, to_dense)


def _shared_level(rows: Sequence[object]) -> float:
    """The level of one interval so that the intervals of all rows hold at once."""
    return 1 - (1 - LEVEL) / len(rows)


def _bounded(*rows: ResultRow) -> bool:
    """Whether all scores are in [0, 1], as those of every task of this package are."""
    return all(0 <= score <= 1 for row in rows for score in row.scores.values())


def _preference(row: ResultRow) -> tuple[float, float, float]:
    score, nll = row.metrics.score, row.metrics.reference_nll
    return (-(score or 0.0), math.inf if nll is None else nll, 1.0 if row.spent is None else row.spent)


def group_means(groups: Iterable[Group]) -> list[GroupMean]:
    """The mean scores over groups of tasks of which at least two were run: ruler/4096 for ruler/4096/vt and others."""
    families: dict[tuple[str, str, str, str], list[Group]] = {}
    for group in groups:
        name = group.task.rpartition("/")[0]
        if "/" in name:
            families.setdefault((group.model, name, group.sparse_from, group.budget_on), []).append(group)
    return [
        _group_mean(key[:3], members, configuration)
        for key, members in families.items()
        if len(members) > 1
        for configuration in dict.fromkeys(row.name for group in members for row in group.rows)
    ]


def _group_mean(key: tuple[str, str, str], members: list[Group], configuration: str) -> GroupMean:
    rows = [next((row for row in group.rows if row.name == configuration and row.scores), None) for group in members]
    tasks = [group.task for group in members]
    missing = [task for task, row in zip(tasks, rows, strict=True) if row is None]
    scores = [list(row.scores.values()) for row in rows if row is not None]
    if missing or not all(0 <= score <= 1 for values in scores for score in values):
        return GroupMean(*key, configuration, tasks, missing)
    differences = [
        [score - group.dense.scores[sample] for sample, score in row.scores.items() if sample in group.dense.scores]
        for row, group in zip(rows, members, strict=True)
        if row is not None and group.dense is not None and row is not group.dense
    ]
    to_dense = None
    if len(differences) == len(members) and all(differences):
        means = [fmean(values) for values in differences]
        ends = group_interval(differences, low=-1.0)
        better, worse = sum(value > 0 for value in means), sum(value < 0 for value in means)
        to_dense = Difference(
            difference=fmean(means), interval=ends, n=len(means), better=better, worse=worse, p_value=sign_test(better, worse)
        )
    mean = fmean(fmean(values) for values in scores)
    return GroupMean(*key, configuration, tasks, missing, mean, group_interval(scores), to_dense)


def run_again(rows: list[ResultRow]) -> str:
    """The command that benchmarks these rows of one (model, task) again, dense beside them."""
    first = rows[0].config
    words = ["python", "benchmark/raytune/run_full_benchmark.py", "--phase", "2"]
    run = next((row.config.config_run for row in rows if row.config.config_run), None)
    words += ["--config-run", run] if run else []
    words += ["--models", first.model, "--tasks", *dict.fromkeys(row.config.task for row in rows)]
    words += ["--configs", *dict.fromkeys([DENSE, *(row.name for row in rows)])]
    budgets = sorted({row.metrics.budget for row in rows if row.metrics.budget is not None})
    words += ["--levels", *(f"{100 * budget:g}" for budget in budgets)] if set(budgets) - _USUAL_BUDGETS else []
    words += ["--budget-on", "kv"] if any(row.metrics.budget_on == "kv" for row in rows) else []
    words += ["--seed", str(first.seed), "--sparse-from", first.sparse_from]
    words += ["--max-new-tokens", str(first.max_new_tokens), "--max-context-length", str(first.max_context_length)]
    words += ["--thinking", first.thinking] if first.thinking != "auto" else []
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
            if (a.config.samples_hash, a.engine) == (b.config.samples_hash, b.engine):
                comparison = compare_paired(b.scores, a.scores, bounded=_bounded(a, b))
        pairs.append(Pair(key, a, b, comparison, changed))
    return pairs


_SETTINGS = (
    "sparse_config", "seed", "dtype", "device", "dense_backend", "attention_backend", "max_new_tokens", "max_context_length",
    "thinking", "samples_hash", "config_run", "versions",
)  # fmt: skip
