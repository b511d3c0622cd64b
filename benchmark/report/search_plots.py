"""The plots of a search, each as .svg and .png.

Every combination has its own colour and marker. The legend is below the panels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from benchmark.report.chart import COLOURS, STYLE, density_axis, look, panel_grid
from benchmark.report.search_budgets import budget_maps
from benchmark.report.search_kinds import methods_figure
from benchmark.report.search_run import Run, Study, budget_label
from benchmark.report.search_tables import Effect
from benchmark.report.table import shorten
from benchmark.storage.records import SPENT
from benchmark.storage.results import safe_name
from benchmark.storage.search_records import FORCED, BestConfig

PANELS = 9  # tasks per page of one panel per task
ROWS = 6  # tasks per page of one panel per task and budget

Pairs = list[tuple[Study, BestConfig]]


@rc_context(STYLE)
def draw_all(run: Run, effects: dict[int, list[Effect]], output: Path) -> list[Path]:
    """Draw every plot into a folder; returns the .png files. An .svg file lies beside each.

    effects: id(study) -> its hyperparameters, from `hyperparameter_effects`."""
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in _figures(run, effects):
        figure.savefig(output / f"{name}.svg", metadata={"Date": None})
        figure.savefig(output / f"{name}.png", dpi=150)
        written.append(output / f"{name}.png")
    return written


def _figures(run: Run, effects: dict[int, list[Effect]]) -> Iterator[tuple[str, Figure]]:
    errors = partial(_by_layer, figure="layer_errors", label="relative error", scale=1.0)
    densities = partial(_by_layer, figure="layer_densities", label="density (%)", scale=100.0)
    models = list(dict.fromkeys(model for model, _ in run.pairs))
    for model in models:
        tasks = [task for other, task in run.pairs if other == model]
        tail = f"_{safe_name(model)}" if len(models) > 1 else ""

        def pages(size: int, tasks: list[str] = tasks, tail: str = tail) -> Iterator[tuple[str, list[str]]]:
            for start in range(0, len(tasks), size):
                yield tail + (f"_{start // size + 1}" if len(tasks) > size else ""), tasks[start : start + size]

        for end, shown in pages(PANELS):
            yield f"error_against_density{end}", _panels(run, model, shown, f"Error against {run.spent}", _error_density)
            yield f"best_error_by_level{end}", _panels(run, model, shown, "Best error of each budget", _best_error)
        for end, shown in pages(ROWS):
            for name, title, draw in (
                ("progress", "Best error within the budget, as trials were tried", _progress),
                ("layer_error", "Error by layer, best configuration (full replay)", errors),
                ("layer_density", "Density by layer, best configuration (full replay)", densities),
            ):
                yield f"{name}{end}", _grid(run, model, shown, title, draw)
        studies = [study for study in run.studies if study.model == model and id(study) in effects]
        if studies:
            yield f"importance{tail}", _importance(run, model, studies, effects)
        methods = methods_figure(run, model)
        if methods is not None:
            yield f"methods{tail}", methods
        for page, figure in enumerate(budget_maps(run, model), 1):
            yield f"head_budgets{tail}" + (f"_{page}" if page > 1 else ""), figure


# -- figures ---------------------------------------------------------------------------------------------------------


def _panels(run: Run, model: str, tasks: list[str], title: str, draw: Callable[[Axes, Run, list[Study]], None]) -> Figure:
    """One panel per task, at most three in a row."""
    figure, panels = panel_grid(len(tasks), 3, (3.7, 3.0), 1.3)
    for task, panel in zip(tasks, panels, strict=True):
        draw(panel, run, run.of(model, task))
        panel.set_title(shorten(task, 40), pad=18 if draw is _error_density else 6)
    _finish(figure, run, f"{title}\n{model}", trials=draw is _error_density, bars=draw is _best_error)
    return figure


def _grid(run: Run, model: str, tasks: list[str], title: str, draw: Callable[[Axes, Run, Pairs], None]) -> Figure:
    """One row of panels per task, one column per budget."""
    budgets = run.budgets
    figure = Figure(figsize=(max(5.6, 2.9 * len(budgets) + 1), 2.0 * len(tasks) + 1.6), layout="constrained")
    axes = figure.subplots(len(tasks), len(budgets), squeeze=False, sharey="row")
    for row, task in zip(axes, tasks, strict=True):
        for panel, budget in zip(row, budgets, strict=True):
            pairs = [(study, level) for study in run.of(model, task) for level in study.levels if level.budget == budget]
            draw(panel, run, pairs)
            panel.set_title(f"{shorten(task, 26)}, {'no budget' if budget is None else f'budget {budget_label(budget)}'}")
            if not pairs:
                panel.text(0.5, 0.5, "not searched", transform=panel.transAxes, ha="center", va="center", color="#666666")
        tops = [panel.dataLim.y1 for panel in row if panel.lines]
        row[0].set_ylim(0, 1.06 * max(tops) if tops and max(tops) > 0 else 1)
    for panel in axes[:, 1:].flat:
        panel.set_ylabel("")
    for panel in axes[:-1].flat:
        panel.set_xlabel("")
    _finish(figure, run, f"{title}\n{model}")
    return figure


def _finish(figure: Figure, run: Run, title: str, trials: bool = False, bars: bool = False) -> None:
    """Add the title above and the legend below the panels. trials: the legend explains what `_error_density` draws."""
    figure.suptitle(title, fontsize=10.5)
    handles: list[Line2D | Patch] = []
    for name in run.combinations:
        colour, marker, dash = look(run.combinations, name)
        label = shorten(name, 46)
        line = Line2D([], [], color=colour, marker=marker, linestyle=dash, markersize=5, label=label)
        handles.append(Patch(color=colour, label=label) if bars else line)
    if trials:
        grey = "#555555"
        handles += [
            Line2D([], [], color=grey, ls="", marker="o", ms=4, mfc="none", alpha=0.55, label="replay only"),
            Line2D([], [], color=grey, ls="", marker="o", ms=5, label="confirmed by a forced forward"),
            Line2D([], [], color=grey, ls="", marker="o", ms=10, mfc="none", label="best of a budget"),
            Line2D([], [], color="#000000", linewidth=1.3, label="Pareto front, confirmed"),
            Line2D([], [], color="#999999", linewidth=1.1, label="Pareto front, replay"),
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if figure.get_figwidth() < 7 else 2, fontsize=8.5)


# -- panels ----------------------------------------------------------------------------------------------------------


def _error_density(panel: Axes, run: Run, studies: list[Study]) -> None:
    shown = []
    for rung, front_colour, width, order in ((0, "#999999", 1.1, 2), (FORCED, "#000000", 1.3, 3)):
        points = [
            pd.DataFrame({"spent": study.spent(rung), "error": study.figures("error", rung)}).dropna() for study in studies
        ]
        for study, found in zip(studies, points, strict=True):
            colour, marker, _ = look(run.combinations, study.combination)
            if rung == 0:
                panel.scatter(found["spent"], found["error"], s=16, marker=marker, fc="none", ec=colour, alpha=0.55, lw=0.8)
            else:
                panel.scatter(found["spent"], found["error"], s=26, marker=marker, color=colour, zorder=4)
        shown.append(pd.concat(points))
        front = pareto_front(list(zip(shown[-1]["spent"], shown[-1]["error"], strict=True)))
        panel.step([x for x, _ in front], [y for _, y in front], where="post", color=front_colour, lw=width, zorder=order)
    best = [level for study in studies for level in study.levels]
    x, y = [getattr(level, SPENT[level.budget_on]) for level in best], [level.error for level in best]
    panel.scatter(x, y, marker="o", s=95, fc="none", ec="#333333", lw=1.0, zorder=5)
    budgets = [budget for budget in run.budgets if budget]
    for budget in budgets:
        panel.axvline(budget, color="#666666", linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
        above = panel.get_xaxis_transform()
        panel.text(budget, 1.02, f"{100 * budget:g}%", transform=above, ha="center", va="bottom", fontsize=8, color="#444444")
    density_axis(panel, [*pd.concat(shown)["spent"], *budgets])
    if run.spent != "density":
        panel.set_xlabel("share of the dense KV bytes (log scale)")
    panel.set_ylim(bottom=0)
    panel.set_ylabel("relative output error")


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (density, error) points for which no other point has both at most as high, sorted by density."""
    front: list[tuple[float, float]] = []
    for density, error in sorted(points):
        if not front or error < front[-1][1]:
            front.append((density, error))
    return front


def _best_error(panel: Axes, run: Run, studies: list[Study]) -> None:
    budgets = run.budgets
    groups = [[(s.combination, level) for s in studies for level in s.levels if level.budget == budget] for budget in budgets]
    width = 0.8 / max(1, *map(len, groups))
    for index, bars in enumerate(groups):
        bars.sort(key=lambda bar: run.combinations.index(bar[0]))
        for number, (name, level) in enumerate(bars):
            panel.bar(
                index + (number + 0.5 - len(bars) / 2) * width,
                level.error,
                width * 0.92,
                color=look(run.combinations, name)[0],
                hatch=None if level.meets_budget else "////",
                edgecolor="white",
                linewidth=0.5,
            )
    panel.set_xticks(range(len(budgets)), ["none" if budget is None else f"{100 * budget:g}%" for budget in budgets])
    panel.set_xlim(-0.6, len(budgets) - 0.4)
    panel.grid(axis="x", visible=False)
    missed = any(not level.meets_budget for study in studies for level in study.levels)
    panel.set_xlabel(f"{run.spent} budget" + (" (hatched: not met)" if missed else ""))
    panel.set_ylabel("relative output error")


def _progress(panel: Axes, run: Run, pairs: Pairs) -> None:
    for study, level in pairs:
        errors, within = study.figures("error", 0), study.spent(0) <= (level.budget or 1.0)
        best = errors.where(within).cummin().ffill().dropna()
        colour, marker, dash = look(run.combinations, study.combination)
        panel.step(best.index + 1, best, where="post", color=colour, linestyle=dash, linewidth=1.3)
        ends = best.iloc[[0, -1]] if len(best) else best
        panel.plot(ends.index + 1, ends, linestyle="", marker=marker, markersize=4, color=colour)
    panel.set_xlim(0, max([len(study.trials) for study, _ in pairs], default=1) + 0.5)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    panel.set_xlabel("trials tried")
    panel.set_ylabel("error (rung 0)")


def _by_layer(panel: Axes, run: Run, pairs: Pairs, figure: str, label: str, scale: float) -> None:
    for study, level in pairs:
        trial = study.best_trial(level)
        rungs = trial.rungs if trial is not None else {}
        values: list[float] = next((found for rung in (1, 0) if rung in rungs and (found := getattr(rungs[rung], figure))), [])
        layers = level.provenance.layers
        layers = layers if len(layers) == len(values) else list(range(len(values)))
        colour, marker, dash = look(run.combinations, study.combination)
        shown = [scale * value for value in values]
        panel.plot(layers, shown, color=colour, linestyle=dash, marker=marker, markersize=2.5, linewidth=1.1)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    panel.set_xlabel("layer")
    panel.set_ylabel(label)


def _importance(run: Run, model: str, studies: list[Study], effects: dict[int, list[Effect]]) -> Figure:
    """One panel per combination: the bars are means over tasks, each dot is one task."""
    found: dict[str, dict[str, list[Effect]]] = {}
    for study in sorted(studies, key=lambda study: run.combinations.index(study.combination)):
        for effect in effects[id(study)]:
            found.setdefault(study.combination, {}).setdefault(effect.name, []).append(effect)
    heights = [len(parameters) + 0.9 for parameters in found.values()]
    figure = Figure(figsize=(7.6, 0.46 * sum(heights) + 1.8), layout="constrained")
    axes = figure.subplots(len(found), 1, squeeze=False, sharex=True, height_ratios=heights)
    bars = (("error_importance", 0.19, COLOURS[0]), ("density_importance", -0.19, COLOURS[4]))
    for panel, (name, parameters) in zip(axes[:, 0], found.items(), strict=True):
        rows = sorted(parameters.items(), key=lambda item: sum(effect.error_importance or 0.0 for effect in item[1]))
        for index, (_, row) in enumerate(rows):
            for share, shift, colour in bars:
                values = [100 * value for effect in row if (value := getattr(effect, share)) is not None]
                if values:
                    panel.barh(index + shift, fmean(values), 0.36, color=colour)
                    panel.scatter(values, [index + shift] * len(values), s=9, color="#222222", zorder=3)
        panel.set_yticks(range(len(rows)), [shorten(parameter, 44) for parameter, _ in rows])
        panel.set_ylim(-0.6, len(rows) - 0.4)
        panel.set_xlim(0, 103)
        panel.grid(axis="y", visible=False)
        panel.set_title(shorten(name, 60), loc="left")
    axes[-1, 0].set_xlabel("share of the variance over trials (%)")
    figure.suptitle(f"Importance of hyperparameters (fANOVA, rung 0)\n{model}", fontsize=10.5)
    handles = [
        Patch(color=COLOURS[0], label="of the error, mean over tasks"),
        Patch(color=COLOURS[4], label="of the density, mean over tasks"),
        Line2D([], [], linestyle="", marker="o", color="#222222", markersize=3, label="one task"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8.5)
    return figure
