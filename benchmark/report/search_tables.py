"""A search as text tables of at most 100 columns: trials, best, budgets, hyperparameters, replay, time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd

from benchmark.report.search_run import Run, Study, budget_label
from benchmark.report.table import WIDTH, number, percent, shorten
from benchmark.storage.records import SPENT
from benchmark.storage.results import fingerprint
from benchmark.storage.search_records import FORCED, BestConfig

MIN_TRIALS = 6  # with fewer no importance is computed
_FIRST_COLUMN = 24
_TREES = 32  # of the random forest of fANOVA; more trees change the shares by less than 0.01

Rows = list[list[str]]


@dataclass(frozen=True)
class Effect:
    """A hyperparameter of a study.

    Importance: the share of the variance over trials that it explains (fANOVA), of log error and log density; None without
    variance. low, high: the lowest and the highest third of its values, and the means over their trials; for a categorical
    hyperparameter the values with the smallest and the largest error.
    """

    name: str
    error_importance: float | None
    density_importance: float | None
    low_value: str
    high_value: str
    low_error: float
    high_error: float
    low_density: float
    high_density: float


def describe(run: Run, effects: dict[int, list[Effect]]) -> str:
    """All tables of a run. effects: id(study) -> its hyperparameters, from `hyperparameter_effects`."""
    trials = sum(len(study.trials) for study in run.studies)
    tables = [trials_table(run), best_table(run), budget_table(run), effects_table(run, effects), replay_table(run)]
    head = f"{run.name}: {len(run.studies)} studies of {len(run.pairs)} tasks, {trials} trials"
    return "\n\n".join([head, *tables, time_table(run)])


def trials_table(run: Run) -> str:
    rungs = range(len(run.rung_names))
    head = ["combination", "trials", *(f"rung {rung}" for rung in rungs), "failed", "timeout", "seconds"]

    def row(study: Study) -> Rows:
        statuses = [trial.status for trial in study.trials]
        counts = [study.figures("density", rung).count() for rung in rungs]
        counts += [statuses.count("failed"), statuses.count("timeout")]
        return [[study.combination, str(len(statuses)), *map(str, counts), f"{study.search_seconds:.0f}"]]

    legend = [f"rung {rung} = {name}" for rung, name in enumerate(run.rung_names)]
    problems = [
        shorten(f"  {study.task} {study.combination}: {trial.trial_id} {trial.status}: {trial.error_message}", WIDTH)
        for study in run.studies
        for trial in study.trials
        if trial.status != "completed"
    ]
    if len(problems) > 5:
        problems[5:] = [f"  ... and {len(problems) - 5} more, in all_trials_data.csv"]
    return section("Trials by combination and rung", by_task(run, head, row), [*legend, *problems])


def best_table(run: Run) -> str:
    head = ["configuration", "error", "density", "score", "KV bytes", "reproduced", "confirmed"]

    def row(best: BestConfig) -> list[str]:
        confirmation = best.confirmation
        figures = [number(best.error), percent(best.density), number(best.score), percent(best.kv_fraction)]
        return [
            best.masker_name,
            *figures,
            percent(confirmation.answers_reproduced, 0),
            "yes" if confirmation.confirmed else "no",
        ]

    legend = [
        "error: of the attention output, of the forced forward where confirmed; score: real answers to the",
        "tuning samples; reproduced: share of them whose dense answer every step would give again",
    ]
    body = by_task(run, head, lambda study: [row(level) for level in study.levels])
    return section("Best of each level", body, [*legend, *_leaders(run)])


def _leaders(run: Run) -> Iterable[str]:
    """One line per (task, budget): the combination with the smallest error."""
    for model, task in run.pairs:
        for budget in (budget for budget in run.budgets if budget is not None):
            levels = [level for study in run.of(model, task) for level in study.levels if level.budget == budget]
            met = [level for level in levels if level.meets_budget]
            best = min(met, key=lambda level: level.error, default=None)
            found = f"{best.masker_name}, error {number(best.error)}" if best else "no configuration met this budget"
            yield shorten(f"{task} at {100 * budget:g}%: {found}", WIDTH)


def budget_table(run: Run) -> str:
    head = ["configuration", "budget", run.spent, "used", "trials within", "met"]

    def row(study: Study, best: BestConfig) -> list[str]:
        all_spent = study.spent().dropna()
        within = f"{(all_spent <= (best.budget or 1.0)).sum()} of {len(all_spent)}"
        spent = getattr(best, SPENT[best.budget_on])
        used = None if best.budget is None or spent is None else spent / best.budget
        met = "-" if best.budget is None else "yes" if best.meets_budget else "NO"
        return [best.masker_name, budget_label(best.budget), percent(spent), percent(used, 0), within, met]

    levels = [level for study in run.studies for level in study.levels if level.budget is not None]
    met = sum(level.meets_budget for level in levels)
    legend = [f"{met} of {len(levels)} budgets are met; used = {run.spent} of the best / budget"]
    body = by_task(run, head, lambda study: [row(study, level) for level in study.levels])
    return section("How well budgets are met", body, legend)


def effects_table(run: Run, effects: dict[int, list[Effect]]) -> str:
    if not effects:
        return section("Hyperparameters", [f"no study has {MIN_TRIALS} trials with different parameters"], [])
    head = ["hyperparameter", "of error", "of density", "low > high", "error there", "density there"]

    def row(effect: Effect) -> list[str]:
        return [
            f"  {effect.name}",
            percent(effect.error_importance, 0),
            percent(effect.density_importance, 0),
            f"{effect.low_value} > {effect.high_value}",
            f"{number(effect.low_error)} > {number(effect.high_error)}",
            f"{percent(effect.low_density)} > {percent(effect.high_density)}",
        ]

    def rows(study: Study) -> Rows:
        found = [row(effect) for effect in effects.get(id(study), [])]
        return [[f"{study.combination}:", *[""] * (len(head) - 1)], *found] if found else []

    legend = [
        "of error, of density: share of the variance over trials that it explains (fANOVA, rung 0);",
        "low > high: medians of the lowest and highest third of its values; mean error and density there",
    ]
    return section("Hyperparameters: importance and effect", by_task(run, head, rows), legend)


def replay_table(run: Run) -> str:
    """How far rungs 0 and 1 are from the forced forward, on the finalists."""
    head = ["combination", "finalists", "rung 0 off by", "rung 1 off by", "pairs in the same order"]

    def row(study: Study) -> Rows:
        finalists = study.figures("density", FORCED).count()
        pairs, same = _ordered_pairs(study)
        medians = [percent(_off(study, rung).abs().median(), 0) for rung in (0, 1)]
        return [[study.combination, str(finalists), *medians, f"{same} of {pairs}" if pairs else "-"]]

    gaps = [(off, study, index) for study in run.studies for index, off in enumerate(_off(study, 1)) if abs(off) >= 0.1]
    gaps.sort(key=lambda gap: -abs(gap[0]))
    worst = [
        shorten(
            f"  {study.task} {study.combination} {study.trials[index].trial_id}: "
            f"replay {number(study.trials[index].figure('error', 1))}, "
            f"forced {number(study.trials[index].figure('error', FORCED))} ({off:+.0%})",
            WIDTH,
        )
        for off, study, index in gaps[:5]
    ]
    legend = [
        "off by: median of |error there / error of the forced forward - 1| over the finalists;",
        "order: pairs of finalists that full replay and forced forward rank alike",
        f"{len(gaps)} finalists differ by 10% or more:" if gaps else "no finalist differs by 10% or more",
    ]
    return section("Where replay and real disagree", by_task(run, head, row), [*legend, *worst])


def _off(study: Study, rung: int) -> pd.Series[float]:
    """Relative difference of a rung's error to the error of the forced forward, by trial."""
    real = study.figures("error", FORCED)
    return study.figures("error", rung) / real.where(real > 0) - 1


def _ordered_pairs(study: Study) -> tuple[int, int]:
    """Number of pairs of trials that differ on both rungs, and of those that full replay and forced forward rank alike."""
    both = [(a, b) for a, b in zip(study.figures("error", 1), study.figures("error", FORCED), strict=True) if a >= 0 and b > 0]
    pairs = [(x, y) for x, y in combinations(both, 2) if x[0] != y[0] and x[1] != y[1]]
    return len(pairs), sum((x[0] < y[0]) == (x[1] < y[1]) for x, y in pairs)


def time_table(run: Run) -> str:
    rows = []
    evaluating = 0.0
    for rung, name in enumerate(run.rung_names):
        seconds = pd.concat([study.figures("seconds", rung) for study in run.studies])
        evaluating += seconds.sum()
        rows.append([f"{rung} {name}", str(seconds.count()), f"{seconds.sum():.1f}", number(seconds.mean())])
    total = sum(study.search_seconds for study in run.studies)
    rows.append(["other: recording traces, loading, sampling", "", f"{max(0.0, total - evaluating):.1f}", ""])
    rows.append(["all studies", "", f"{total:.1f}", ""])
    legend = ["seconds of all studies added up; studies that ran side by side count each"]
    return section("Time spent", text_table(["rung", "evaluations", "seconds", "seconds each"], rows), legend)


# -- hyperparameters -------------------------------------------------------------------------------------------------


def hyperparameter_effects(study: Study) -> list[Effect]:
    """Importance and effect of every hyperparameter that varies, the most important for the error first. Trials are compared
    on rung 0, which all of them reached. [] with fewer than `MIN_TRIALS` trials."""
    even = [trial.table is None for trial in study.trials]  # others have the parameters of a trial with even budgets
    figures = pd.DataFrame({name: study.figures(name, 0) for name in ("error", "density")})[even].dropna()
    if len(figures) < MIN_TRIALS:
        return []
    params = pd.DataFrame([trial.params for trial in study.trials], dtype=object).loc[figures.index]
    # Numbers stay as they are, other values become text: a categorical value can be a list.
    varied = {str(name): column for name, column in params.items() if column.map(repr).nunique() > 1}
    columns = {name: column if _numeric(column) else column.map(repr) for name, column in varied.items()}
    importances = [_importance(columns, figures[name]) for name in ("error", "density")] if columns else []
    effects = [_effect(name, column, figures, [found.get(name) for found in importances]) for name, column in columns.items()]
    return sorted(effects, key=lambda effect: -(effect.error_importance or 0.0))


def _numeric(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _importance(columns: Mapping[str, pd.Series[Any]], figure: pd.Series[float]) -> dict[str, float]:
    import optuna

    values = [math.log10(value + 1e-6) for value in figure]
    if max(values) - min(values) < 1e-9:
        return {}
    rebuilt = optuna.create_study()
    distributions = {name: _distribution(list(column)) for name, column in columns.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, value in enumerate(values):
            params = {name: column.iloc[index] for name, column in columns.items()}
            rebuilt.add_trial(optuna.create_trial(params=params, distributions=distributions, value=value))
        evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=_TREES, seed=0)
        return dict(optuna.importance.get_param_importances(rebuilt, evaluator=evaluator))


def _distribution(values: list[Any]) -> Any:
    import optuna

    if not _numeric(values):
        return optuna.distributions.CategoricalDistribution(sorted(set(values)))
    low, high = min(values), max(values)
    whole = all(isinstance(value, int) for value in values)
    kind: Any = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
    return kind(low, high, log=low > 0 and high / low >= 10)


def _effect(name: str, column: pd.Series[Any], figures: pd.DataFrame, importances: list[float | None]) -> Effect:
    if _numeric(column):
        ordered, third = column.astype(float).sort_values(), max(1, len(column) // 3)
        # Trials with equal values go into the same third.
        low, high = ordered[ordered <= ordered.iloc[third - 1]], ordered[ordered >= ordered.iloc[-third]]
        shown = [f"{group.median():.3g}" for group in (low, high)]
    else:
        by_error = figures["error"].groupby(column, sort=False).mean().sort_values(kind="stable").index
        low, high = column[column == by_error[0]], column[column == by_error[-1]]
        shown = [str(group.iloc[0]).strip("'") for group in (low, high)]
    means: Any = [float(figures.loc[group.index, figure].mean()) for figure in ("error", "density") for group in (low, high)]
    return Effect(name, importances[0], importances[1], shorten(shown[0], 8), shorten(shown[1], 8), *means)


# -- two runs --------------------------------------------------------------------------------------------------------


def compare_rows(first: Run, second: Run) -> list[dict[str, Any]]:
    """One row per level of either run, with the figures of both; None for a run that lacks the level."""
    levels: dict[tuple[str, str, str], list[BestConfig | None]] = {}
    for index, run in enumerate((first, second)):
        for study in run.studies:
            for found in study.levels:
                levels.setdefault((study.model, study.task, found.masker_name), [None, None])[index] = found
    rows = []
    for (model, task, name), pair in levels.items():
        row: dict[str, Any] = {"model": model, "task": task, "configuration": name}
        for letter, level in zip("ab", pair, strict=True):
            for figure in ("error", "density", "score", "meets_budget", "num_trials"):
                row[f"{figure}_{letter}"] = None if level is None else getattr(level, figure)
        rows.append(row)
    return rows


def compare_table(first: Run, second: Run, rows: list[dict[str, Any]]) -> str:
    """The best of each level of two runs side by side, and which settings differ. rows: from `compare_rows`."""
    lines = [f"A = {first.name}, B = {second.name}"]
    changed = [f"settings differ: {name}: A {a}, B {b}" for name, (a, b) in _differences(first, second).items()]
    lines += changed or ["same settings"]
    head = ["configuration", "error A", "error B", "change", "density A", "density B", "score A", "score B"]
    tables: dict[tuple[str, str], Rows] = {}
    for row in rows:
        a, b = row["error_a"], row["error_b"]
        cells = [row["configuration"], number(a), number(b), f"{b / a - 1:+.0%}" if a and b is not None else "-"]
        cells += [percent(row["density_a"]), percent(row["density_b"]), number(row["score_a"]), number(row["score_b"])]
        tables.setdefault((row["model"], row["task"]), []).append(cells)
    for (model, task), shown in tables.items():
        lines += ["", f"{task}  ({model})", *text_table(head, shown)]
    errors = pd.DataFrame(rows, columns=["error_a", "error_b"], dtype=float)
    lower, higher = ((errors["error_b"] < errors["error_a"]).sum(), (errors["error_b"] > errors["error_a"]).sum())
    both = len(errors.dropna())
    lines += ["", f"{both} levels in both: B has the smaller error in {lower}, the larger in {higher}"]
    alone = {"A": errors["error_b"].isna().sum(), "B": errors["error_a"].isna().sum()}
    lines += [f"{count} levels only in {letter}" for letter, count in alone.items() if count]
    return "\n".join(shorten(line, WIDTH) for line in lines)


def _differences(first: Run, second: Run) -> dict[str, tuple[str | None, str | None]]:
    """Settings and package versions that differ between two searches: name -> (first, second)."""
    names = (
        "seed", "sparse_from", "objective", "dtype", "device", "max_context_length", "max_new_tokens", "num_samples", "samples",
        "thinking", "head_budgets", "weights",
    )  # fmt: skip

    def settings(run: Run) -> dict[str, str]:
        records = [level.provenance for study in run.studies for level in study.levels]
        values = {name: {_short(getattr(record, name)) for record in records} for name in names}
        values["budget_on"] = {level.budget_on for study in run.studies for level in study.levels}
        for package in sorted({package for record in records for package in record.versions}):
            values[package] = {str(record.versions.get(package)) for record in records}
        return {name: ", ".join(sorted(found)) for name, found in values.items()}

    a, b = settings(first), settings(second)
    return {name: (a.get(name), b.get(name)) for name in a | b if a.get(name) != b.get(name)}


def _short(value: object) -> str:
    """A setting as text; of a list, which is long, its length and hash."""
    return f"{len(value)} ({fingerprint(value)[:8]})" if isinstance(value, list) else repr(value)


# -- text ------------------------------------------------------------------------------------------------------------


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of at most WIDTH characters. The first column is aligned left and shortened if needed, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    room = WIDTH - 1 - sum(width + 2 for width in widths[1:])
    widths[0] = max(_FIRST_COLUMN, min(widths[0], room))
    lines = []
    for first, *others in [head, ["-" * width for width in widths], *rows]:
        cells = [shorten(first, widths[0]).ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append((" " + "  ".join(cells)).rstrip())
    return lines


def by_task(run: Run, head: Sequence[str], rows_of: Callable[[Study], Rows]) -> list[str]:
    lines: list[str] = []
    for model, task in run.pairs:
        rows = [row for study in run.of(model, task) for row in rows_of(study)]
        if rows:
            lines += [shorten(f"{task}  ({model})", WIDTH), *text_table(head, rows)]
    return lines


def section(title: str, body: Iterable[str], legend: Iterable[str]) -> str:
    return "\n".join([title, "=" * len(title), *body, *legend])
