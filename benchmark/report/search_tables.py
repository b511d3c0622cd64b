"""A search as text tables of at most 100 columns: trials, best, budgets, hyperparameters, replay, time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median
from typing import Any

from benchmark.report.search_run import FORCED, Level, Run, Study, Trial
from benchmark.report.table import WIDTH, number, percent, shorten

MIN_TRIALS = 6  # with fewer no importance is computed
_FIRST_COLUMN = 24
_TREES = 32  # of the random forest of fANOVA; more trees change the shares by less than 0.01


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
    rungs = [f"rung {number}" for number in range(len(run.rung_names))]
    head = ["combination", "trials", *rungs, "failed", "timeout", "seconds"]

    def row(study: Study) -> list[str]:
        counts = [sum(rung in trial.rungs for trial in study.trials) for rung in range(len(run.rung_names))]
        failed = [sum(trial.status == status for trial in study.trials) for status in ("failed", "timeout")]
        return [study.combination, str(len(study.trials)), *map(str, [*counts, *failed]), f"{study.search_seconds:.0f}"]

    legend = [f"rung {number} = {name}" for number, name in enumerate(run.rung_names)]
    problems = [
        f"  {study.task} {study.combination}: {trial.trial_id} {trial.status}: {trial.error_message}"
        for study in run.studies
        for trial in study.trials
        if trial.status != "completed"
    ]
    if len(problems) > 5:
        problems[5:] = [f"  ... and {len(problems) - 5} more, in all_trials_data.csv"]
    body = _by_task(run, head, lambda study: [row(study)])
    return _section("Trials by combination and rung", body, [*legend, *(shorten(line, WIDTH) for line in problems)])


def best_table(run: Run) -> str:
    head = ["configuration", "error", "density", "score", "KV bytes", "reproduced", "confirmed"]

    def rows(study: Study) -> list[list[str]]:
        return [
            [
                level.name,
                number(level.best.error),
                percent(level.best.density),
                number(level.best.score),
                percent(level.best.kv_fraction),
                percent(level.best.confirmation.answers_reproduced, 0),
                "yes" if level.best.confirmation.confirmed else "no",
            ]
            for level in study.levels
        ]

    legend = [
        "error: of the attention output, of the forced forward where confirmed; score: real answers to the",
        "tuning samples; reproduced: share of them whose dense answer every step would give again",
    ]
    return _section("Best of each level", _by_task(run, head, rows), [*legend, *_leaders(run)])


def _leaders(run: Run) -> Iterable[str]:
    """One line per (task, budget): the combination with the smallest error."""
    for model, task in run.pairs:
        for budget in (budget for budget in run.budgets if budget is not None):
            levels = [level for study in run.of(model, task) for level in study.levels if level.budget == budget]
            met = [level for level in levels if level.best.meets_budget]
            best = min(met, key=lambda level: level.best.error, default=None)
            found = f"{best.name}, error {number(best.best.error)}" if best else "no configuration met this budget"
            yield shorten(f"{task} at {100 * budget:g}%: {found}", WIDTH)


def budget_table(run: Run) -> str:
    head = ["configuration", "budget", "density", "used", "trials within", "met"]

    def rows(study: Study) -> list[list[str]]:
        found = []
        for level in study.levels:
            densities = [density for trial in study.trials if (density := trial.last("density")) is not None]
            within = sum(density <= (level.budget or 1.0) for density in densities)
            used = None if level.budget is None else level.best.density / level.budget
            met = "-" if level.budget is None else ("yes" if level.best.meets_budget else "NO")
            shown = [percent(level.best.density), percent(used, 0), f"{within} of {len(densities)}", met]
            found.append([level.name, level.label, *shown])
        return found

    levels = [level for study in run.studies for level in study.levels if level.budget is not None]
    met = sum(level.best.meets_budget for level in levels)
    legend = [f"{met} of {len(levels)} budgets are met; used = density of the best / budget"]
    return _section("How well budgets are met", _by_task(run, head, rows), legend)


def effects_table(run: Run, effects: dict[int, list[Effect]]) -> str:
    head = ["hyperparameter", "of error", "of density", "low > high", "error there", "density there"]

    def rows(study: Study) -> list[list[str]]:
        known = effects.get(id(study), [])
        found = [[f"{study.combination}:", *[""] * (len(head) - 1)]] if known else []
        for effect in known:
            found.append(
                [
                    f"  {effect.name}",
                    percent(effect.error_importance, 0),
                    percent(effect.density_importance, 0),
                    f"{effect.low_value} > {effect.high_value}",
                    f"{number(effect.low_error)} > {number(effect.high_error)}",
                    f"{percent(effect.low_density)} > {percent(effect.high_density)}",
                ]
            )
        return found

    legend = [
        "of error, of density: share of the variance over trials that it explains (fANOVA, rung 0);",
        "low > high: medians of the lowest and highest third of its values; mean error and density there",
    ]
    if not effects:
        return _section("Hyperparameters", [f"no study has {MIN_TRIALS} trials with different parameters"], [])
    return _section("Hyperparameters: importance and effect", _by_task(run, head, rows), legend)


def replay_table(run: Run) -> str:
    """How far rungs 0 and 1 are from the forced forward, on the finalists."""
    head = ["combination", "finalists", "rung 0 off by", "rung 1 off by", "pairs in the same order"]

    def row(study: Study) -> list[list[str]]:
        finalists = [trial for trial in study.trials if trial.confirmed]
        pairs, same = _ordered_pairs(finalists)
        offs = [[abs(off) for trial in finalists if (off := _off(trial, rung)) is not None] for rung in (0, 1)]
        medians = [percent(median(found), 0) if found else "-" for found in offs]
        return [[study.combination, str(len(finalists)), *medians, f"{same} of {pairs}" if pairs else "-"]]

    gaps = [
        (abs(off), off, study, trial)
        for study in run.studies
        for trial in study.trials
        if (off := _off(trial, 1)) is not None and abs(off) >= 0.1
    ]
    gaps.sort(key=lambda entry: -entry[0])
    worst = [
        shorten(
            f"  {study.task} {study.combination} {trial.trial_id}: replay {number(trial.figure('error', 1))}, "
            f"forced {number(trial.figure('error', FORCED))} ({off:+.0%})",
            WIDTH,
        )
        for _, off, study, trial in gaps[:5]
    ]
    legend = [
        "off by: median of |error there / error of the forced forward - 1| over the finalists;",
        "order: pairs of finalists that full replay and forced forward rank alike",
        f"{len(gaps)} finalists differ by 10% or more:" if gaps else "no finalist differs by 10% or more",
    ]
    return _section("Where replay and real disagree", _by_task(run, head, row), [*legend, *worst])


def _off(trial: Trial, rung: int) -> float | None:
    """Relative difference of a rung's error to the error of the forced forward."""
    replayed, real = trial.figure("error", rung), trial.figure("error", FORCED)
    return None if replayed is None or not real else replayed / real - 1


def _ordered_pairs(trials: list[Trial]) -> tuple[int, int]:
    """Number of pairs of trials that differ on both rungs, and of those that full replay and forced forward rank alike."""
    both = [(a, b) for trial in trials if (a := trial.figure("error", 1)) is not None and (b := trial.figure("error", FORCED))]
    pairs = [(x, y) for x, y in combinations(both, 2) if x[0] != y[0] and x[1] != y[1]]
    return len(pairs), sum((x[0] < y[0]) == (x[1] < y[1]) for x, y in pairs)


def time_table(run: Run) -> str:
    rows = []
    evaluating = 0.0
    for rung, name in enumerate(run.rung_names):
        seconds = [s for study in run.studies for t in study.trials if (s := t.figure("seconds", rung)) is not None]
        evaluating += sum(seconds)
        rows.append([f"{rung} {name}", str(len(seconds)), f"{sum(seconds):.1f}", number(fmean(seconds) if seconds else None)])
    total = sum(study.search_seconds for study in run.studies)
    rows.append(["other: recording traces, loading, sampling", "", f"{max(0.0, total - evaluating):.1f}", ""])
    rows.append(["all studies", "", f"{total:.1f}", ""])
    legend = ["seconds of all studies added up; studies that ran side by side count each"]
    return _section("Time spent", text_table(["rung", "evaluations", "seconds", "seconds each"], rows), legend)


# -- hyperparameters -------------------------------------------------------------------------------------------------


def hyperparameter_effects(study: Study) -> list[Effect]:
    """Importance and effect of every hyperparameter that varies, the most important for the error first. Trials are compared
    on rung 0, which all of them reached. [] with fewer than `MIN_TRIALS` trials."""
    trials = [t for t in study.trials if t.figure("error", 0) is not None and t.figure("density", 0) is not None]
    if len(trials) < MIN_TRIALS:
        return []
    names = [name for name in trials[0].params if len({repr(trial.params.get(name)) for trial in trials}) > 1]
    importances = {figure: _importance(trials, names, figure) for figure in ("error", "density")} if names else {}
    effects = [_effect(name, trials, importances) for name in names]
    return sorted(effects, key=lambda effect: -(effect.error_importance or 0.0))


def _importance(trials: list[Trial], names: list[str], figure: str) -> dict[str, float]:
    import warnings

    import optuna

    values = [math.log10((trial.figure(figure, 0) or 0.0) + 1e-6) for trial in trials]
    if max(values) - min(values) < 1e-9:
        return {}
    columns = {name: _column([trial.params[name] for trial in trials]) for name in names}
    distributions = {name: _distribution(column) for name, column in columns.items()}
    rebuilt = optuna.create_study()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, value in enumerate(values):
            params = {name: column[index] for name, column in columns.items()}
            rebuilt.add_trial(optuna.create_trial(params=params, distributions=distributions, value=value))
        evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=_TREES, seed=0)
        found = optuna.importance.get_param_importances(rebuilt, evaluator=evaluator)
    return dict(found)


def _column(values: list[Any]) -> list[Any]:
    """Numbers unchanged, other values as text: a categorical value can be a list."""
    return values if _numeric(values) else [repr(value) for value in values]


def _distribution(values: list[Any]) -> Any:
    import optuna

    if not _numeric(values):
        return optuna.distributions.CategoricalDistribution(sorted(set(values)))
    low, high = min(values), max(values)
    wide = low > 0 and high / low >= 10
    if all(isinstance(value, int) for value in values):
        return optuna.distributions.IntDistribution(low, high, log=wide)
    return optuna.distributions.FloatDistribution(low, high, log=wide)


def _numeric(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _effect(name: str, trials: list[Trial], importances: dict[str, dict[str, float]]) -> Effect:
    values = [trial.params[name] for trial in trials]
    if _numeric(values):

        def size(trial: Trial) -> float:
            return float(trial.params[name])  # type: ignore[arg-type]  # all are numbers

        ordered = sorted(trials, key=size)
        third = max(1, len(ordered) // 3)
        # Trials with equal values go into the same third.
        edges = size(ordered[third - 1]), size(ordered[-third])
        low = [trial for trial in ordered if size(trial) <= edges[0]]
        high = [trial for trial in ordered if size(trial) >= edges[1]]
        shown = [f"{median(map(size, group)):.3g}" for group in (low, high)]
    else:
        groups = {repr(value): [trial for trial in trials if trial.params[name] == value] for value in values}
        by_error = sorted(groups, key=lambda value: _mean(groups[value], "error"))
        low, high = groups[by_error[0]], groups[by_error[-1]]
        shown = [by_error[0].strip("'"), by_error[-1].strip("'")]
    return Effect(
        name,
        importances["error"].get(name),
        importances["density"].get(name),
        shorten(shown[0], 8),
        shorten(shown[1], 8),
        _mean(low, "error"),
        _mean(high, "error"),
        _mean(low, "density"),
        _mean(high, "density"),
    )


def _mean(trials: list[Trial], figure: str) -> float:
    return fmean(trial.figure(figure, 0) or 0.0 for trial in trials)


# -- two runs --------------------------------------------------------------------------------------------------------


def compare_rows(first: Run, second: Run) -> list[dict[str, Any]]:
    """One row per level of either run, with the figures of both; None for a run that lacks the level."""
    levels: dict[tuple[str, str, str], list[Level | None]] = {}
    for index, run in enumerate((first, second)):
        for study in run.studies:
            for found in study.levels:
                levels.setdefault((study.model, study.task, found.name), [None, None])[index] = found
    rows = []
    for (model, task, name), pair in levels.items():
        row: dict[str, Any] = {"model": model, "task": task, "configuration": name}
        for letter, level in zip("ab", pair, strict=True):
            for figure in ("error", "density", "score", "meets_budget", "num_trials"):
                row[f"{figure}_{letter}"] = None if level is None else getattr(level.best, figure)
        rows.append(row)
    return rows


def compare_table(first: Run, second: Run) -> str:
    """The best of each level of two runs side by side, and which settings differ."""
    rows = compare_rows(first, second)
    lines = [f"A = {first.name}, B = {second.name}"]
    changed = [f"settings differ: {name}: A {a}, B {b}" for name, (a, b) in _differences(first, second).items()]
    lines += changed or ["same settings"]
    head = ["configuration", "error A", "error B", "change", "density A", "density B", "score A", "score B"]
    tables: dict[tuple[str, str], list[list[str]]] = {}
    for row in rows:
        a, b = row["error_a"], row["error_b"]
        cells = [row["configuration"], number(a), number(b), f"{b / a - 1:+.0%}" if a and b is not None else "-"]
        cells += [percent(row["density_a"]), percent(row["density_b"]), number(row["score_a"]), number(row["score_b"])]
        tables.setdefault((row["model"], row["task"]), []).append(cells)
    for (model, task), shown in tables.items():
        lines += ["", f"{task}  ({model})", *text_table(head, shown)]
    errors = [(row["error_a"], row["error_b"]) for row in rows]
    both = [(a, b) for a, b in errors if a is not None and b is not None]
    lower, higher = sum(b < a for a, b in both), sum(b > a for a, b in both)
    lines += ["", f"{len(both)} levels in both: B has the smaller error in {lower}, the larger in {higher}"]
    alone = {"A": sum(b is None for _, b in errors), "B": sum(a is None for a, _ in errors)}
    lines += [f"{count} levels only in {letter}" for letter, count in alone.items() if count]
    return "\n".join(shorten(line, WIDTH) for line in lines)


def _differences(first: Run, second: Run) -> dict[str, tuple[Any, Any]]:
    """Settings and package versions that differ between two searches: name -> (first, second)."""
    names = (
        "seed", "sparse_from", "objective", "dtype", "device", "max_context_length", "max_new_tokens", "num_samples",
    )  # fmt: skip
    found = []
    for run in (first, second):
        records = [level.best.provenance for study in run.studies for level in study.levels]
        values = {name: ", ".join(sorted({repr(getattr(record, name)) for record in records})) for name in names}
        for package in sorted({package for record in records for package in record.versions}):
            values[package] = ", ".join(sorted({str(record.versions.get(package)) for record in records}))
        found.append(values)
    a, b = found
    return {name: (a.get(name), b.get(name)) for name in a | b if a.get(name) != b.get(name)}


# -- text ------------------------------------------------------------------------------------------------------------


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of at most WIDTH characters. The first column is aligned left and shortened if needed, the others right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    room = WIDTH - 1 - sum(width + 2 for width in widths[1:])
    widths[0] = max(_FIRST_COLUMN, min(widths[0], room))
    lines = []
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [shorten(row[0], widths[0]).ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append((" " + "  ".join(cells)).rstrip())
    return lines


def _by_task(run: Run, head: Sequence[str], rows_of: Any) -> list[str]:
    lines: list[str] = []
    for model, task in run.pairs:
        rows = [row for study in run.of(model, task) for row in rows_of(study)]
        if rows:
            lines += [shorten(f"{task}  ({model})", WIDTH), *text_table(head, rows)]
    return lines


def _section(title: str, body: Iterable[str], legend: Iterable[str]) -> str:
    return "\n".join([title, "=" * len(title), *body, *legend])
