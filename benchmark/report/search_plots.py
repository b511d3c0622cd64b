"""The plots of a Phase 1 run, each as .svg and .png.

Colours are Okabe and Ito's, which people with any colour vision can tell apart (https://jfly.uni-koeln.de/color/); every
combination has its own marker too. The legend stands outside the panels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.report.search_run import FORCED, Level, Run, Study
from benchmark.report.search_tables import Effect, shorten
from benchmark.storage.results import safe_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
PANELS = 9  # tasks a page of small panels
ROWS = 6  # tasks a page of a grid of tasks and budgets
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "trials",  # the same run gives the same file
    "svg.fonttype": "none",
}


def draw_all(run: Run, effects: dict[int, list[Effect]], output: Path) -> list[Path]:
    """Draw every plot into a folder; the paths of the .png files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    output.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(_STYLE):
        for name, figure in _figures(run, effects):
            for suffix, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 150})):
                figure.savefig(output / f"{name}{suffix}", **options)  # type: ignore[arg-type]
            plt.close(figure)
            written.append(output / f"{name}.png")
    return written


def _figures(run: Run, effects: dict[int, list[Effect]]) -> Iterator[tuple[str, Figure]]:
    models = list(dict.fromkeys(model for model, _ in run.pairs))
    for model in models:
        tasks = [task for other, task in run.pairs if other == model]
        tail = f"_{safe_name(model)}" if len(models) > 1 else ""
        pages = [tasks[start : start + PANELS] for start in range(0, len(tasks), PANELS)]
        for page, shown in enumerate(pages):
            mark = tail + (f"_{page + 1}" if len(pages) > 1 else "")
            yield f"error_against_density{mark}", _panels(run, model, shown, "Error against density", _error_density)
            yield f"best_error_by_level{mark}", _panels(run, model, shown, "Best error of each budget", _best_error)
        pages = [tasks[start : start + ROWS] for start in range(0, len(tasks), ROWS)]
        for page, shown in enumerate(pages):
            mark = tail + (f"_{page + 1}" if len(pages) > 1 else "")
            yield f"progress{mark}", _grid(run, model, shown, "Best error within the budget, as trials were tried", _progress)
            yield (
                f"layer_error{mark}",
                _grid(run, model, shown, "Error by layer, best configuration (full replay)", _layer_error),
            )
            yield (
                f"layer_density{mark}",
                _grid(run, model, shown, "Density by layer, best configuration (full replay)", _layer_density),
            )
        studies = [study for study in run.studies if study.model == model and id(study) in effects]
        if studies:
            yield f"importance{tail}", _importance(run, model, studies, effects)


# -- panels ----------------------------------------------------------------------------------------------------------


def _panels(run: Run, model: str, tasks: list[str], title: str, draw: Callable[[Axes, Run, list[Study]], None]) -> Figure:
    """One panel a task, at most three beside each other."""
    import matplotlib.pyplot as plt

    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(5.6, 3.7 * columns), 3.0 * rows + 1.3), squeeze=False, layout="constrained"
    )
    for place, panel in enumerate(axes.flat):
        if place >= len(tasks):
            panel.set_visible(False)
            continue
        draw(panel, run, run.of(model, tasks[place]))
        panel.set_title(shorten(tasks[place], 40), pad=18 if draw is _error_density else 6)
    _finish(figure, run, f"{title}\n{model}", marks=draw is _error_density, bars=draw is _best_error)
    return figure


def _grid(
    run: Run, model: str, tasks: list[str], title: str, draw: Callable[[Axes, Run, list[tuple[Study, Level]]], None]
) -> Figure:
    """A row a task, a column a budget."""
    import matplotlib.pyplot as plt

    budgets = run.budgets
    size = (max(5.6, 2.9 * len(budgets) + 1), 2.0 * len(tasks) + 1.6)
    figure, axes = plt.subplots(len(tasks), len(budgets), figsize=size, squeeze=False, sharey="row", layout="constrained")
    for row, task in enumerate(tasks):
        for column, budget in enumerate(budgets):
            panel = axes[row][column]
            pairs = [(s, level) for s in run.of(model, task) for level in s.levels if level.budget == budget]
            draw(panel, run, pairs)
            told = "no budget" if budget is None else f"budget {100 * budget:g}%"
            panel.set_title(f"{shorten(task, 26)}, {told}")
            if not pairs:
                panel.text(0.5, 0.5, "not searched", transform=panel.transAxes, ha="center", va="center", color="#666666")
            if column:
                panel.set_ylabel("")
            if row < len(tasks) - 1:
                panel.set_xlabel("")
        tops = [panel.dataLim.y1 for panel in axes[row] if panel.lines]
        axes[row][0].set_ylim(0, 1.06 * max(tops) if tops and max(tops) > 0 else 1)
    _finish(figure, run, f"{title}\n{model}")
    return figure


def _finish(figure: Figure, run: Run, title: str, marks: bool = False, bars: bool = False) -> None:
    """Title above, legend below: neither covers a panel."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure.suptitle(title, fontsize=10.5)
    handles: list[Any] = []
    for name in run.combinations:
        colour, marker, dash = _look(run, name)
        if bars:
            handles.append(Patch(color=colour, label=shorten(name, 46)))
            continue
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle=dash, markersize=5, label=shorten(name, 46)))
    if marks:
        faint = {"linestyle": "", "marker": "o", "markerfacecolor": "none", "color": "#555555"}
        handles += [
            Line2D([], [], alpha=0.55, markersize=4, label="replay only", **faint),  # type: ignore[arg-type]
            Line2D([], [], linestyle="", marker="o", color="#555555", markersize=5, label="confirmed by a forced forward"),
            Line2D([], [], markersize=10, label="best of a budget", **faint),  # type: ignore[arg-type]
            Line2D([], [], color="#000000", linewidth=1.3, label="Pareto front, confirmed"),
            Line2D([], [], color="#999999", linewidth=1.1, label="Pareto front, replay"),
        ]
    columns = 1 if figure.get_figwidth() < 7 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8.5)


def _look(run: Run, combination: str) -> tuple[str, str, str]:
    """Colour, marker and dash of a combination, the same in every plot of the run."""
    place = run.combinations.index(combination)
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)], DASHES[place // len(COLOURS) % len(DASHES)]


# -- what a panel shows ----------------------------------------------------------------------------------------------


def _error_density(panel: Axes, run: Run, studies: list[Study]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    replayed: list[tuple[float, float]] = []
    confirmed: list[tuple[float, float]] = []
    for study in studies:
        colour, marker, _ = _look(run, study.combination)
        for rung, kept, style in (
            (0, replayed, {"facecolors": "none", "edgecolors": colour, "alpha": 0.55, "s": 16, "linewidths": 0.8}),
            (FORCED, confirmed, {"color": colour, "s": 26, "zorder": 4}),
        ):
            points = [(t.figure("density", rung), t.figure("error", rung)) for t in study.trials]
            points = [(x, y) for x, y in points if x is not None and y is not None]
            kept += points  # type: ignore[arg-type]
            if points:
                panel.scatter(*zip(*points, strict=True), marker=marker, **style)  # type: ignore[arg-type]
        for level in study.levels:
            x, y = float(level.record["density"]), float(level.record["error"])
            panel.scatter([x], [y], marker="o", s=95, facecolors="none", edgecolors="#333333", linewidths=1.0, zorder=5)
    for points, line in (
        (replayed, {"color": "#999999", "lw": 1.1}),
        (confirmed, {"color": "#000000", "lw": 1.3, "zorder": 3}),
    ):
        front = pareto_front(points)
        if front:
            panel.step(*zip(*front, strict=True), where="post", **line)  # type: ignore[arg-type]
    panel.set_xscale("log")
    for budget in run.budgets:
        if budget is not None:
            panel.axvline(budget, color="#666666", linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
            panel.text(
                budget,
                1.02,
                f"{100 * budget:g}%",
                transform=panel.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=8,
                color="#444444",
            )
    densities = [x for x, _ in replayed + confirmed] + [budget for budget in run.budgets if budget]
    if densities:
        panel.set_xlim(min(densities) * 0.8, min(1.1, max(densities) * 1.25))
    ticks = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    panel.set_ylim(bottom=0)
    panel.set_xlabel("density (share of keys attended)")
    panel.set_ylabel("relative output error")


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point is as sparse as with a smaller error, by density."""
    front: list[tuple[float, float]] = []
    for density, error in sorted(points):
        if not front or error < front[-1][1]:
            front.append((density, error))
    return front


def _best_error(panel: Axes, run: Run, studies: list[Study]) -> None:
    budgets = run.budgets
    found = [
        [(study.combination, level) for study in studies for level in study.levels if level.budget == budget]
        for budget in budgets
    ]
    width = 0.8 / max(1, *(len(bars) for bars in found))
    for place, bars in enumerate(found):
        bars.sort(key=lambda bar: run.combinations.index(bar[0]))
        for number, (name, level) in enumerate(bars):
            panel.bar(
                place + (number + 0.5 - len(bars) / 2) * width,
                float(level.record["error"]),
                width * 0.92,
                color=_look(run, name)[0],
                hatch=None if level.record["meets_budget"] else "////",
                edgecolor="white",
                linewidth=0.5,
            )
    panel.set_xticks(range(len(budgets)), ["none" if budget is None else f"{100 * budget:g}%" for budget in budgets])
    panel.set_xlim(-0.6, len(budgets) - 0.4)
    panel.grid(axis="x", visible=False)
    missed = any(not level.record["meets_budget"] for study in studies for level in study.levels)
    panel.set_xlabel("density budget" + (" (hatched: not met)" if missed else ""))
    panel.set_ylabel("relative output error")


def _progress(panel: Axes, run: Run, pairs: list[tuple[Study, Level]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for study, level in pairs:
        best: list[float | None] = []
        for trial in study.trials:
            error, density = trial.figure("error", 0), trial.figure("density", 0)
            fits = error is not None and density is not None and density <= (level.budget or 1.0)
            known = best[-1] if best else None
            best.append(error if fits and error is not None and (known is None or error < known) else known)
        shown = [(place + 1, value) for place, value in enumerate(best) if value is not None]
        colour, marker, dash = _look(run, study.combination)
        if shown:
            panel.step(*zip(*shown, strict=True), where="post", color=colour, linestyle=dash, linewidth=1.3)
            first = shown[0]
            panel.plot(
                [first[0], shown[-1][0]], [first[1], shown[-1][1]], linestyle="", marker=marker, markersize=4, color=colour
            )
    panel.set_xlim(0, max([len(study.trials) for study, _ in pairs], default=1) + 0.5)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    panel.set_xlabel("trials tried")
    panel.set_ylabel("error (rung 0)")


def _layer_error(panel: Axes, run: Run, pairs: list[tuple[Study, Level]]) -> None:
    _by_layer(panel, run, pairs, "layer_errors", 1.0)
    panel.set_ylabel("relative error")


def _layer_density(panel: Axes, run: Run, pairs: list[tuple[Study, Level]]) -> None:
    _by_layer(panel, run, pairs, "layer_densities", 100.0)
    panel.set_ylabel("density (%)")


def _by_layer(panel: Axes, run: Run, pairs: list[tuple[Study, Level]], figure: str, scale: float) -> None:
    from matplotlib.ticker import MaxNLocator

    for study, level in pairs:
        rungs = level.trial.rungs if level.trial is not None else {}
        values = next((rungs[rung][figure] for rung in (1, 0) if rungs.get(rung, {}).get(figure)), None)
        if not values:
            continue
        layers = level.record.get("provenance", {}).get("layers") or []
        layers = layers if len(layers) == len(values) else list(range(len(values)))
        colour, marker, dash = _look(run, study.combination)
        panel.plot(
            layers, [scale * v for v in values], color=colour, linestyle=dash, marker=marker, markersize=2.5, linewidth=1.1
        )
    panel.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    panel.set_xlabel("layer")


def _importance(run: Run, model: str, studies: list[Study], effects: dict[int, list[Effect]]) -> Figure:
    """A panel a combination: bars are means over tasks, dots the tasks."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = [name for name in run.combinations if any(study.combination == name for study in studies)]
    found: dict[str, dict[str, list[Effect]]] = {name: {} for name in names}
    for study in studies:
        for effect in effects[id(study)]:
            found[study.combination].setdefault(effect.name, []).append(effect)
    heights = [len(found[name]) + 0.9 for name in names]
    figure, axes = plt.subplots(
        len(names), 1, figsize=(7.6, 0.46 * sum(heights) + 1.8), squeeze=False, sharex=True, layout="constrained",
        height_ratios=heights,
    )  # fmt: skip
    for panel, name in zip(axes[:, 0], names, strict=True):
        rows = sorted(found[name].items(), key=lambda item: sum(e.error_importance or 0.0 for e in item[1]))
        for place, (_, row) in enumerate(rows):
            for shift, key, colour in ((0.19, "error_importance", COLOURS[0]), (-0.19, "density_importance", COLOURS[4])):
                values = [100 * value for effect in row if (value := getattr(effect, key)) is not None]
                if values:
                    panel.barh(place + shift, sum(values) / len(values), 0.36, color=colour)
                    panel.scatter(values, [place + shift] * len(values), s=9, color="#222222", zorder=3)
        panel.set_yticks(range(len(rows)), [shorten(name, 44) for name, _ in rows])
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
