"""The head budgets that a search fitted: a table as text, and what each layer and head got as heat maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmark.report.chart import panel_grid
from benchmark.report.search_run import Run, Study
from benchmark.report.search_tables import by_task, section
from benchmark.report.table import number, percent, shorten
from benchmark.storage.search_records import FORCED, BestConfig, HeadBudgetTable, TrialRow

PANELS = 9


class Fitted(NamedTuple):
    """A level for which head budgets were fitted, and the trial that has them."""

    study: Study
    level: BestConfig
    trial: TrialRow
    table: HeadBudgetTable

    @property
    def shares(self) -> list[list[float]]:
        """The density that each (layer, head) got in the full replay; [] if that was not reached."""
        figures = self.trial.rungs.get(1)
        return (figures.head_densities if figures is not None else None) or []


def fitted_levels(run: Run) -> list[Fitted]:
    """Those of a run, in the order of its studies."""
    return [
        Fitted(study, level, trial, trial.table)
        for study in run.studies
        for trial in study.trials
        for level in study.levels
        if trial.table is not None and trial.table.level == level.masker_name
    ]


def budgets_table(run: Run) -> str:
    """How each table of head budgets was fitted and what it gained; a line that says so where there is none."""
    found = fitted_levels(run)
    if not found:
        return section("Head budgets", ["none was fitted, or even budgets did as well"], [])
    head = ["configuration", "by", "trust", "held out", "even", "uneven", "nll", "least to most", "used"]

    def row(fitted: Fitted) -> list[str]:
        level, table = fitted.level, fitted.table
        even = None if level.even_budgets is None else level.even_budgets.error
        forced = fitted.trial.figure("error", FORCED)
        same = [trial for trial in fitted.study.trials if trial.params == fitted.trial.params and trial.table is None]
        nlls = [trial.figure("reference_nll", FORCED) for trial in (fitted.trial, *same[:1])]
        change = "-" if None in nlls or len(nlls) < 2 else f"{nlls[0] - nlls[1]:+.3f}"  # type: ignore[operator]
        flat = [share for layer in fitted.shares for share in layer]
        spread = f"{percent(min(flat))} to {percent(max(flat))}" if flat else "-"
        used = level.best_trial_id == fitted.trial.trial_id
        figures = [percent(table.strength, 0), f"{100 * table.held_out:+.1f}%", number(even), number(forced), change, spread]
        return [level.masker_name, table.by, *figures, "yes" if used else "no"]

    legend = [
        "trust: 0 = even, 100% = as fitted; held out: change of the replayed error at equal density, on rows",
        "that the table was not fitted on; even, uneven: error of the forced forward, - if it was not reached;",
        "nll: what it adds to the dense answers' negative log-likelihood per token there, at most 0.01 if it is used;",
        "least to most: density of a layer's head; used: it is the best of its level",
    ]
    body = by_task(run, head, lambda study: [row(fitted) for fitted in found if fitted.study is study])
    return section("Head budgets", body, legend)


def budget_maps(run: Run, model: str) -> Iterator[Figure]:
    """Pages of heat maps, layer x head, of the density that each got."""
    shown = [fitted for fitted in fitted_levels(run) if fitted.study.model == model and fitted.shares]
    for start in range(0, len(shown), PANELS):
        page = shown[start : start + PANELS]
        figure, panels = panel_grid(len(page), 3, (3.9, 2.5), 0.8)
        for fitted, panel in zip(page, panels, strict=True):
            columnwise = [[100 * share for share in head] for head in zip(*fitted.shares, strict=True)]
            image = panel.imshow(columnwise, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest")
            figure.colorbar(image, ax=panel, label="density (%)")
            panel.grid(visible=False)
            panel.set_title(f"{shorten(fitted.study.task, 36)}\n{shorten(fitted.level.masker_name, 36)}", fontsize=8)
            panel.set_xlabel("layer")
            panel.set_ylabel(fitted.table.by.replace("_", " ") if len(columnwise) > 1 else "")
            panel.set_yticks(range(len(columnwise)) if len(columnwise) <= 8 else [0, len(columnwise) - 1])
        figure.suptitle(f"Head budgets: density of each layer and head (full replay)\n{model}", fontsize=10.5)
        yield figure
