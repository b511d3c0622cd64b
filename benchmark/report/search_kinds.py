"""Many methods in one plot: the mean error over tasks at each budget, a panel for each kind of method."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from benchmark.report.chart import look, panel_grid
from benchmark.report.search_run import Run, Study, budget_label
from benchmark.report.table import shorten

#: From this many combinations on the plot is drawn: bars side by side are hard to read then.
LEAST = 8
#: Maskers that evict: what they keep is chosen when the context ends. tests/report/test_search_kinds.py holds it to the library,
#: whose classes are not imported here, because that takes seconds.
EVICTIONS = {"SnapKVConfig", "ExpectedAttentionConfig", "KeyDiffConfig", "KnormConfig", "H2OConfig", "TOVAConfig"}
SAMPLERS = {"RandomSamplingMaskerConfig", "AdaptiveSamplingMaskerConfig", "MagicPigConfig"}
KINDS = {
    "oracle": "oracles, which read all keys",
    "retrieval": "retrievals, chosen for each query",
    "eviction": "evictions, chosen before the question",
    "sampling": "sampling, with weights",
}


def kind_of(maskers: Sequence[str]) -> str:
    """The key of KINDS of a combination, given the names of its masker configs."""
    if SAMPLERS & set(maskers):
        return "sampling"
    if EVICTIONS & set(maskers):
        return "eviction"
    return "oracle" if any(name.startswith("Oracle") for name in maskers) else "retrieval"


def methods_figure(run: Run, model: str) -> Figure | None:
    """None with few combinations, or without budgets."""
    studies = [study for study in run.studies if study.model == model and any(level.budget for level in study.levels)]
    budgets = [budget for budget in run.budgets if budget]
    by_kind: dict[str, dict[str, list[Study]]] = {kind: {} for kind in KINDS}
    for study in studies:
        maskers = [entry.type for entry in study.levels[0].sparse_config.masker_configs]
        by_kind[kind_of(maskers)].setdefault(study.combination, []).append(study)
    shown = {kind: found for kind, found in by_kind.items() if found}
    if sum(map(len, shown.values())) < LEAST or len(budgets) < 2:
        return None
    figure, panels = panel_grid(len(shown), 2, (6.6, 3.4), 0.8, share=True)
    for panel, (kind, found) in zip(panels, shown.items(), strict=True):
        _draw(panel, run, found, budgets)
        panel.set_title(KINDS[kind])
    tasks = len({study.task for study in studies})
    over = f", mean over {tasks} tasks" if tasks > 1 else ""
    figure.suptitle(f"Best error of each budget{over}, methods by kind\n{model}", fontsize=10.5)
    return figure


def _draw(panel: Axes, run: Run, found: dict[str, list[Study]], budgets: list[float]) -> None:
    """One line per combination; the legend begins with the largest error."""
    lines, means = {}, {}
    for name, studies in found.items():
        points = []
        for budget in budgets:
            errors = [level.error for study in studies for level in study.levels if level.budget == budget]
            if errors:
                points.append((budget, fmean(errors)))
        colour, marker, dash = look(sorted(found), name)
        x, y = zip(*points, strict=True)
        means[name] = fmean(y)
        (lines[name],) = panel.plot(x, y, color=colour, marker=marker, linestyle=dash, markersize=4, linewidth=1.2)
    ranked = sorted(lines, key=lambda name: -means[name])
    labels = [shorten(name.removeprefix("sink_local_"), 40) for name in ranked]
    panel.legend([lines[name] for name in ranked], labels, fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.02))
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(budgets, [budget_label(budget) for budget in budgets])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{error:g}"))
    panel.minorticks_off()
    panel.tick_params(labelbottom=True, labelleft=True)
    panel.set_xlabel(f"{run.spent} budget (log scale)")
    panel.set_ylabel("relative output error (log scale)")
