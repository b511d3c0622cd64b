"""The plots of a search, each as .svg and .png.

The colours are Okabe and Ito's, which people with any colour vision can tell apart (https://jfly.uni-koeln.de/color/); every
combination also has its own marker. The legend is below the panels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from benchmark.report.chart import MARKERS, STYLE, density_axis
from benchmark.report.search_run import FORCED, Level, Run, Study
from benchmark.report.search_tables import Effect
from benchmark.report.table import shorten
from benchmark.storage.results import safe_name

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
PANELS = 9  # tasks per page of one panel per task
ROWS = 6  # tasks per page of one panel per task and budget

Pairs = list[tuple[Study, Level]]


@rc_context(STYLE)
def draw_all(run: Run, effects: dict[int, list[Effect]], output: Path) -> list[Path]:
    """Draw every plot into a folder.

    Parameters
    ----------
    run : Run
        The search.
    effects : dict
        id(study) -> its hyperparameters, from `hyperparameter_effects`.
    output : Path
        The folder; it is created if needed.

    Returns
    -------
    list of Path
        The .png files; an .svg file lies beside each.
    """
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in _figures(run, effects):
        figure.savefig(output / f"{name}.svg", metadata={"Date": None})
        figure.savefig(output / f"{name}.png", dpi=150)
        written.append(output / f"{name}.png")
    return written


def _figures(run: Run, effects: dict[int, list[Effect]]) -> Iterator[tuple[str, Figure]]:
    models = list(dict.fromkeys(model for model, _ in run.pairs))
    for model in models:
        tasks = [task for other, task in run.pairs if other == model]
        tail = f"_{safe_name(model)}" if len(models) > 1 else ""

        def pages(size: int, tasks: list[str] = tasks, tail: str = tail) -> Iterator[tuple[str, list[str]]]:
            for start in range(0, len(tasks), size):
                yield tail + (f"_{start // size + 1}" if len(tasks) > size else ""), tasks[start : start + size]

        for end, shown in pages(PANELS):
            yield f"error_against_density{end}", _panels(run, model, shown, "Error against density", _error_density)
            yield f"best_error_by_level{end}", _panels(run, model, shown, "Best error of each budget", _best_error)
        for end, shown in pages(ROWS):
            for name, title, draw in (
                ("progress", "Best error within the budget, as trials were tried", _progress),
                ("layer_error", "Error by layer, best configuration (full replay)", _layer_error),
                ("layer_density", "Density by layer, best configuration (full replay)", _layer_density),
            ):
                yield f"{name}{end}", _grid(run, model, shown, title, draw)
        studies = [study for study in run.studies if study.model == model and id(study) in effects]
        if studies:
            yield f"importance{tail}", _importance(run, model, studies, effects)


# -- figures ---------------------------------------------------------------------------------------------------------


def _panels(run: Run, model: str, tasks: list[str], title: str, draw: Callable[[Axes, Run, list[Study]], None]) -> Figure:
    """One panel per task, at most three in a row."""
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(max(5.6, 3.7 * columns), 3.0 * rows + 1.3), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for task, panel in zip(tasks, panels, strict=False):
        draw(panel, run, run.of(model, task))
        panel.set_title(shorten(task, 40), pad=18 if draw is _error_density else 6)
    for panel in panels:  # those left in the last row
        panel.set_visible(False)
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
            panel.set_title(f"{shorten(task, 26)}, {'no budget' if budget is None else f'budget {100 * budget:g}%'}")
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
    handles: list[Any] = []
    for name in run.combinations:
        colour, marker, dash = _look(run, name)
        line = Line2D([], [], color=colour, marker=marker, linestyle=dash, markersize=5)
        handles.append(Patch(color=colour) if bars else line)
        handles[-1].set_label(shorten(name, 46))
    if trials:
        dot: dict[str, Any] = {"linestyle": "", "marker": "o", "color": "#555555"}
        handles += [
            Line2D([], [], alpha=0.55, markersize=4, markerfacecolor="none", label="replay only", **dot),
            Line2D([], [], markersize=5, label="confirmed by a forced forward", **dot),
            Line2D([], [], markersize=10, markerfacecolor="none", label="best of a budget", **dot),
            Line2D([], [], color="#000000", linewidth=1.3, label="Pareto front, confirmed"),
            Line2D([], [], color="#999999", linewidth=1.1, label="Pareto front, replay"),
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if figure.get_figwidth() < 7 else 2, fontsize=8.5)


def _look(run: Run, combination: str) -> tuple[str, str, Any]:
    """Colour, marker and dash of a combination, the same in every plot of the run."""
    index = run.combinations.index(combination)
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], DASHES[index // len(COLOURS) % len(DASHES)]


# -- panels ----------------------------------------------------------------------------------------------------------


def _error_density(panel: Axes, run: Run, studies: list[Study]) -> None:
    replayed: list[tuple[float, float]] = []
    confirmed: list[tuple[float, float]] = []
    for study in studies:
        colour, marker, _ = _look(run, study.combination)
        hollow = {"facecolors": "none", "edgecolors": colour, "alpha": 0.55, "s": 16, "linewidths": 0.8}
        for rung, kept, style in ((0, replayed, hollow), (FORCED, confirmed, {"color": colour, "s": 26, "zorder": 4})):
            figures = [(trial.figure("density", rung), trial.figure("error", rung)) for trial in study.trials]
            points = [(x, y) for x, y in figures if x is not None and y is not None]
            kept += points
            panel.scatter([x for x, _ in points], [y for _, y in points], marker=marker, **style)  # type: ignore[arg-type]
        for level in study.levels:
            at = [level.best.density], [level.best.error]
            panel.scatter(*at, marker="o", s=95, facecolors="none", edgecolors="#333333", linewidths=1.0, zorder=5)
    for points, colour, width, order in ((replayed, "#999999", 1.1, 2), (confirmed, "#000000", 1.3, 3)):
        front = pareto_front(points)
        panel.step([x for x, _ in front], [y for _, y in front], where="post", color=colour, lw=width, zorder=order)
    budgets = [budget for budget in run.budgets if budget]
    top: dict[str, Any] = {"transform": panel.get_xaxis_transform(), "ha": "center", "va": "bottom"}
    for budget in budgets:
        panel.axvline(budget, color="#666666", linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
        panel.text(budget, 1.02, f"{100 * budget:g}%", fontsize=8, color="#444444", **top)
    density_axis(panel, [*[x for x, _ in replayed + confirmed], *budgets])
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
                level.best.error,
                width * 0.92,
                color=_look(run, name)[0],
                hatch=None if level.best.meets_budget else "////",
                edgecolor="white",
                linewidth=0.5,
            )
    panel.set_xticks(range(len(budgets)), ["none" if budget is None else f"{100 * budget:g}%" for budget in budgets])
    panel.set_xlim(-0.6, len(budgets) - 0.4)
    panel.grid(axis="x", visible=False)
    missed = any(not level.best.meets_budget for study in studies for level in study.levels)
    panel.set_xlabel("density budget" + (" (hatched: not met)" if missed else ""))
    panel.set_ylabel("relative output error")


def _progress(panel: Axes, run: Run, pairs: Pairs) -> None:
    for study, level in pairs:
        best: list[tuple[int, float]] = []
        lowest = math.inf
        for tried, trial in enumerate(study.trials, start=1):
            error, density = trial.figure("error", 0), trial.figure("density", 0)
            if error is not None and density is not None and density <= (level.budget or 1.0):
                lowest = min(lowest, error)
            if lowest < math.inf:
                best.append((tried, lowest))
        colour, marker, dash = _look(run, study.combination)
        panel.step([x for x, _ in best], [y for _, y in best], where="post", color=colour, linestyle=dash, linewidth=1.3)
        ends = [*best[:1], *best[-1:]]
        panel.plot([x for x, _ in ends], [y for _, y in ends], linestyle="", marker=marker, markersize=4, color=colour)
    panel.set_xlim(0, max([len(study.trials) for study, _ in pairs], default=1) + 0.5)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    panel.set_xlabel("trials tried")
    panel.set_ylabel("error (rung 0)")


def _layer_error(panel: Axes, run: Run, pairs: Pairs) -> None:
    _by_layer(panel, run, pairs, "layer_errors", 1.0)
    panel.set_ylabel("relative error")


def _layer_density(panel: Axes, run: Run, pairs: Pairs) -> None:
    _by_layer(panel, run, pairs, "layer_densities", 100.0)
    panel.set_ylabel("density (%)")


def _by_layer(panel: Axes, run: Run, pairs: Pairs, figure: str, scale: float) -> None:
    for study, level in pairs:
        rungs = level.trial.rungs if level.trial is not None else {}
        values: list[float] = next((found for rung in (1, 0) if rung in rungs and (found := getattr(rungs[rung], figure))), [])
        layers = level.best.provenance.layers
        layers = layers if len(layers) == len(values) else list(range(len(values)))
        colour, marker, dash = _look(run, study.combination)
        shown = [scale * value for value in values]
        panel.plot(layers, shown, color=colour, linestyle=dash, marker=marker, markersize=2.5, linewidth=1.1)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    panel.set_xlabel("layer")


def _importance(run: Run, model: str, studies: list[Study], effects: dict[int, list[Effect]]) -> Figure:
    """One panel per combination: the bars are means over tasks, each dot is one task."""
    found: dict[str, dict[str, list[Effect]]] = {}
    for study in sorted(studies, key=lambda study: run.combinations.index(study.combination)):
        for effect in effects[id(study)]:
            found.setdefault(study.combination, {}).setdefault(effect.name, []).append(effect)
    heights = [len(parameters) + 0.9 for parameters in found.values()]
    figure = Figure(figsize=(7.6, 0.46 * sum(heights) + 1.8), layout="constrained")
    axes = figure.subplots(len(found), 1, squeeze=False, sharex=True, height_ratios=heights)
    for panel, (name, parameters) in zip(axes[:, 0], found.items(), strict=True):
        rows = sorted(parameters.items(), key=lambda item: sum(effect.error_importance or 0.0 for effect in item[1]))
        for index, (_, row) in enumerate(rows):
            for shift, figure_name, colour in ((0.19, "error", COLOURS[0]), (-0.19, "density", COLOURS[4])):
                shares = [getattr(effect, f"{figure_name}_importance") for effect in row]
                values: list[float] = [100 * share for share in shares if share is not None]
                if values:
                    panel.barh(index + shift, sum(values) / len(values), 0.36, color=colour)
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
