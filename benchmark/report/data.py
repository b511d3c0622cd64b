"""A results tree read for its report: one row a (model, task, configuration), and which configuration to use at a budget."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.settings import DENSE, SparseConfig
from benchmark.stats import Comparison, compare_paired
from benchmark.storage.results import safe_name
from sparse_attention_hub.errors import UserError

#: A row fits a budget whose measured density passes it by no more than a tenth: the rule of Phase 2's own mark.
BUDGET_SLACK = 1.1
#: A method counts as saving reads at a budget if it reads at most this many times the budget in bytes, selector included.
BYTES_SLACK = 2.0


@dataclass(frozen=True)
class ResultRow:
    """One folder of results. metrics, config: what its two JSON files hold."""

    folder: Path
    metrics: dict[str, Any]
    config: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.metrics["configuration"])

    @property
    def is_dense(self) -> bool:
        return self.config["sparse_config"] is None

    @property
    def family(self) -> str:
        return SparseConfig(self.name, None, None).family

    @property
    def budget(self) -> float | None:
        return self.metrics["budget"]

    @property
    def samples(self) -> dict[str, int]:
        return self.metrics["samples"]

    @property
    def key(self) -> tuple[str, str, str]:
        """What rows must share to stand beside each other: model, task, protocol."""
        return str(self.metrics["model"]), str(self.metrics["task"]), str(self.config["sparse_from"])

    def figure(self, name: str) -> float | None:
        value = self.metrics.get(name)
        return None if value is None else float(value)

    def sample_scores(self) -> dict[str, float]:
        """Scores of the answered samples by place in raw_results.csv; rows of equal `samples_hash` agree in places."""
        return _column(self.folder / "raw_results.csv", str(self.metrics["metric"]))

    def meets_budget(self) -> bool | None:
        """Whether the search met the budget; None if nobody knows."""
        return self.config.get("provenance", {}).get("meets_budget")


@dataclass
class Group:
    """The rows of one (model, task, protocol). strangers: rows that answered other samples and are compared with nothing."""

    model: str
    task: str
    sparse_from: str
    rows: list[ResultRow]
    strangers: list[ResultRow] = field(default_factory=list)

    @property
    def dense(self) -> ResultRow | None:
        return next((row for row in self.rows if row.is_dense), None)

    @property
    def budgets(self) -> list[float]:
        return sorted({row.budget for row in self.rows if row.budget is not None})


@dataclass(frozen=True)
class Choice:
    """What to use at a budget. runner_up: the next best and the paired difference best - runner_up on the same samples;
    light: the best of those that read few bytes, where `best` itself reads many."""

    budget: float
    best: ResultRow
    runner_up: ResultRow | None
    margin: Comparison | None
    light: ResultRow | None


@dataclass
class Tree:
    """A results folder. summary: what benchmark_summary.json holds, {} without one."""

    folder: Path
    groups: list[Group]
    summary: dict[str, Any]

    @property
    def rows(self) -> list[ResultRow]:
        return [row for group in self.groups for row in [*group.rows, *group.strangers]]

    def failures(self) -> list[dict[str, Any]]:
        """Every failure record of the rows, and those of the last run that belong to no row."""
        found = [
            {"model": row.metrics["model"], "task": row.metrics["task"], "configuration": row.name, **entry}
            for row in self.rows
            for entry in row.metrics["failures"]
        ]
        return found + [entry for entry in self.summary.get("failures", []) if entry.get("configuration") is None]


def read_tree(folder: Path) -> Tree:
    """Read all results under a folder. UserError if there are none, or a file is not as Phase 2 writes it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a benchmark results folder")
    groups: dict[tuple[str, str, str], Group] = {}
    for path in sorted(folder.glob("*/*/*/metrics.json")):
        row = ResultRow(path.parent, _load(path), _load(path.with_name("config.json")))
        try:
            moved_aside = path.parent.name != safe_name(str(row.metrics["task"]))
            if not moved_aside:
                _check(row)
                groups.setdefault(row.key, Group(*row.key, [])).rows.append(row)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: is not a result of Phase 2 ({type(error).__name__}: {error}); run it again") from None
    if not groups:
        raise UserError(f"{folder}: holds no results (no <model>/<configuration>/<task>/metrics.json); run --phase 2 first")
    for group in groups.values():
        group.rows.sort(key=lambda row: (not row.is_dense, row.family, row.budget or 0.0, row.name))
        own = group.dense.config if group.dense else None
        hashes = Counter(row.config["samples_hash"] for row in group.rows)
        asked = own["samples_hash"] if own else hashes.most_common(1)[0][0]
        group.strangers = [row for row in group.rows if row.config["samples_hash"] != asked]
        group.rows = [row for row in group.rows if row.config["samples_hash"] == asked]
    summary = folder / "benchmark_summary.json"
    return Tree(folder, sorted(groups.values(), key=_order), _load(summary) if summary.exists() else {})


def choose(group: Group, budget: float) -> Choice | None:
    """The row to use at a budget: of the sparse rows whose measured density keeps it, the best score, then the smallest
    reference_nll, then the fewest keys. None if none keeps it."""
    fits = [row for row in group.rows if _fits(row, budget)]
    if not fits:
        return None
    fits.sort(key=_preference)
    best = fits[0]
    runner_up = fits[1] if len(fits) > 1 else None
    margin = compare_paired(best.sample_scores(), runner_up.sample_scores()) if runner_up else None
    light = None
    if not _is_light(best, budget):
        light = next((row for row in fits if _is_light(row, budget)), None)
    return Choice(budget, best, runner_up, margin, light)


def run_again(rows: list[ResultRow]) -> str:
    """The command that benchmarks these rows of one (model, task) again, dense beside them."""
    first = rows[0].config
    names = list(dict.fromkeys([DENSE, *(row.name for row in rows)]))
    words = ["python", "benchmark/raytune/run_full_benchmark.py", "--phase", "2"]
    run = next((row.config["config_run"] for row in rows if row.config.get("config_run")), None)
    words += ["--config-run", run] if run else []
    words += ["--models", first["model"], "--tasks", *dict.fromkeys(row.config["task"] for row in rows), "--configs", *names]
    words += ["--seed", str(first["seed"]), "--sparse-from", first["sparse_from"]]
    words += ["--max-new-tokens", str(first["max_new_tokens"]), "--max-context-length", str(first["max_context_length"])]
    words += ["--max-requests", str(first["max_requests"])] if first["max_requests"] is not None else []
    words += ["--dtype", first["dtype"]] if first.get("dtype") in ("float32", "bfloat16", "float16") else []
    return shlex.join(words)


def compare_trees(first: Tree, second: Tree) -> list[dict[str, Any]]:
    """A row for each (model, task, protocol, configuration) of either tree: its two rows, and the paired difference
    second - first where both answered the same samples."""
    pairs: dict[tuple[str, ...], list[ResultRow | None]] = {}
    for place, tree in enumerate((first, second)):
        for row in tree.rows:
            pairs.setdefault((*row.key, row.name), [None, None])[place] = row
    compared = []
    for key, (a, b) in pairs.items():
        same = a is not None and b is not None and a.config["samples_hash"] == b.config["samples_hash"]
        comparison = compare_paired(b.sample_scores(), a.sample_scores()) if same and a and b else None
        changed = [name for name in _SETTINGS if a and b and a.config.get(name) != b.config.get(name)]
        compared.append({"key": key, "a": a, "b": b, "comparison": comparison, "changed": changed})
    return compared


_SETTINGS = (
    "sparse_config", "seed", "dtype", "device", "dense_backend", "attention_backend", "max_new_tokens", "max_context_length",
    "samples_hash", "config_run", "versions",
)  # fmt: skip


def _fits(row: ResultRow, budget: float) -> bool:
    density = row.figure("density")
    return not row.is_dense and row.figure("score") is not None and density is not None and density <= BUDGET_SLACK * budget


def _preference(row: ResultRow) -> tuple[float, float, float]:
    nll, density = row.figure("reference_nll"), row.figure("density")
    return (-(row.figure("score") or 0.0), float("inf") if nll is None else nll, 1.0 if density is None else density)


def _is_light(row: ResultRow, budget: float) -> bool:
    read = row.figure("kv_fraction")
    return read is not None and read <= BYTES_SLACK * budget


def _order(group: Group) -> tuple[str, str, str]:
    return group.model, group.task, group.sparse_from


def _check(row: ResultRow) -> None:
    """KeyError or TypeError now rather than in the middle of a page."""
    for name in ("model", "task", "metric", "score", "interval", "density", "budget", "failures"):
        row.metrics[name]
    for name in ("total", "ok", "failed", "missing"):
        int(row.samples[name])
    for name in ("sparse_config", "samples_hash", "sparse_from", "seed", "versions", "max_requests", "max_new_tokens"):
        row.config[name]


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); run Phase 2 again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; run Phase 2 again")
    return content


def _column(path: Path, name: str) -> dict[str, float]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # contexts are long
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = csv.DictReader(stream)
            return {
                f"{place:09d}": float(row[name])
                for place, row in enumerate(rows)
                if row.get("status") == "ok" and row.get(name) not in (None, "")
            }
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); run Phase 2 again") from None
