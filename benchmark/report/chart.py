"""Score against density as inline SVG: one curve per masker combination through its budgets, with 95% intervals."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any, Literal, NamedTuple

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from benchmark.report.data import Group, ResultRow

Style = dict[Any, Any]  # matplotlib's settings have no common type

Dash = Literal["-", "--", ":", "-."]
#: Okabe and Ito's, which people with any colour vision can tell apart (https://jfly.uni-koeln.de/color/).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Dash, ...] = ("-", "--", ":", "-.")
STYLE: Style = {
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
    "text.parse_math": False,  # a "$" in a name is a "$"
    "svg.hashsalt": "report",  # the same results give the same file
    "svg.fonttype": "none",
}
# Stand-in colours: `_svg` replaces each by the page's CSS variable of that name, so that charts follow light and dark mode.
_NAMES = ("c0", "c1", "c2", "c3", "c4", "c5", "c6", "dense", "line", "soft")
_COLOURS = {name: f"#fe000{digit}" for digit, name in enumerate(_NAMES)}
_REWRITES = (
    (r"^.*?(?=<svg)|<style.*?</style>|<clipPath.*?</clipPath>|<g id=[^>]*/>", ""),
    (r' clip-path="[^"]*"| xmlns(:xlink)?="[^"]*"| transform="rotate\(-0 [^"]*"', ""),
    (r"""<g id=(["'])tooltip ([^>]*)\1>""", r"<g><title>\2</title>"),
    (r"<g id=[^>]*>", "<g>"),
    *((colour, f"var(--{name})") for name, colour in _COLOURS.items()),
)
_PAGE_STYLE: Style = {
    **STYLE,
    "font.size": 12.5,
    "axes.labelsize": 12.5,
    "axes.edgecolor": _COLOURS["soft"],
    "grid.color": _COLOURS["line"],
    "grid.linewidth": 1.0,
    "lines.linewidth": 1.5,
    "lines.markersize": 8.5,
    **{f"{axis}tick.major.{name}": value for axis in "xy" for name, value in (("size", 0), ("pad", 7))},
}
_KV_LABEL = "share of the dense KV bytes (log scale)"
_DENSE_LINE: Style = {"color": _COLOURS["dense"], "linewidth": 1.8, "dashes": (3.3, 2.2)}
_DENSE_BAND: Style = {"facecolor": _COLOURS["dense"], "edgecolor": "none", "alpha": 0.16}


def look(combinations: list[str], combination: str) -> tuple[str, str, Dash]:
    """Colour, marker and dash of one of these combinations, the same in every plot of a run."""
    index = combinations.index(combination)  # 7 colours and 6 markers make 42 pairs
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], DASHES[index // len(COLOURS) % len(DASHES)]


def families(groups: Sequence[Group]) -> list[str]:
    """Masker combinations in the order of their colours."""
    return list(dict.fromkeys(row.family for group in groups for row in group.rows if not row.is_dense))


@rc_context(_PAGE_STYLE)
def chart(group: Group, names: Sequence[str]) -> str:
    """The SVG of one group; "" if no sparse row has both a score and a density. names: all combinations, see `families`."""
    points = sorted(point for row in group.rows if (point := _point(row)) and not row.is_dense)
    if not points:
        return ""
    figure = Figure(figsize=(6.4, 4.3), layout="constrained")
    panel = figure.subplots()
    dense = _point(group.dense) if group.dense else None
    if dense:
        panel.axhspan(*dense.ends, **_DENSE_BAND)
        panel.axhline(dense.score, **_DENSE_LINE)
    for index, name in enumerate(names):
        own = [point for point in points if point.family == name]
        colour, marker = _look(index)
        panel.plot([point.density for point in own], [point.score for point in own], color=colour, alpha=0.75)
        for x, y, ends, _, tooltip in own:
            panel.plot([x, x], ends, color=colour, marker="_", gid=tooltip)
            panel.plot([x], [y], color=colour, marker=marker, gid=tooltip)
    density_axis(panel, [point.density for point in points])
    if group.budget_on == "kv":
        panel.set_xlabel(_KV_LABEL)
    panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    panel.set_ylim(0, 1.03 * max(point.ends[1] for point in [*points, *([dense] if dense else [])]) or 1)
    panel.set_ylabel(f"score ({group.rows[0].metrics.metric})")
    return _svg(figure, f'role="img" aria-label="{escape(f"score against density, {group.task}")}"')


@rc_context(_PAGE_STYLE)
def budget_chart(group: Group, names: Sequence[str]) -> str:
    """The SVG of the errors that a group's searches found at each budget: with even head budgets (dashed), and with the best that
    were fitted; "" where none were. names: see `families`."""
    figure = Figure(figsize=(6.4, 4.3), layout="constrained")
    panel = figure.subplots()
    spent: list[float] = []
    for index, name in enumerate(names):
        own = [row.config.provenance for row in group.rows if row.family == name and row.config.provenance is not None]
        pairs = [(found.budget, found.even_budgets.error, found.error) for found in own if found.even_budgets and found.budget]
        budgets, even, best = zip(*sorted(pairs), strict=True) if pairs else ((), (), ())
        colour, marker = _look(index)
        panel.plot(budgets, even, color=colour, marker=marker, alpha=0.5, dashes=(3.3, 2.2))
        panel.plot(budgets, best, color=colour, marker=marker)
        spent += budgets
    if not spent:
        return ""
    density_axis(panel, spent)
    panel.set_xlabel("budget (log scale)")
    panel.set_ylim(bottom=0)
    panel.set_ylabel("error of the forced forward, tuning samples")
    return _svg(figure, f'role="img" aria-label="{escape(f"even against fitted head budgets, {group.task}")}"')


class _Point(NamedTuple):
    density: float
    score: float
    ends: tuple[float, float]
    family: str
    tooltip: str


def _point(row: ResultRow) -> _Point | None:
    """A row in the chart; None without score or density."""
    score, density, ends = row.metrics.score, row.spent, row.metrics.interval
    if score is None or not density:
        return None
    sure = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
    what = "KV bytes" if row.metrics.budget_on == "kv" else "density"
    tooltip = f"tooltip {row.name}: score {score:.3f}{sure} at {what} {100 * density:.1f}%"
    return _Point(density, score, ends or (score, score), row.family, tooltip)


@rc_context(_PAGE_STYLE)
def legend(names: Sequence[str], has_dense: bool) -> list[tuple[str, str]]:
    """(SVG, label) of each combination's marker, then of the line of dense attention."""

    def entry(*artists: Artist) -> str:
        figure = Figure(figsize=(26 / 72, 14 / 72))
        for artist in artists:
            figure.add_artist(artist)
        return _svg(figure, 'aria-hidden="true"')

    entries = []
    for index, name in enumerate(names):
        colour, marker = _look(index)
        entries.append((entry(Line2D([0, 0.5, 1], [0.5] * 3, color=colour, marker=marker, markevery=[1])), name))
    if has_dense:
        band, line = Rectangle((0, 0.15), 1, 0.7, **_DENSE_BAND), Line2D([0, 1], [0.5, 0.5], **_DENSE_LINE)
        entries.append((entry(band, line), "dense, with its interval"))
    return entries


def _look(index: int) -> tuple[str, str]:
    """Colour and marker of a combination: 7 colours and 6 markers make 42 pairs."""
    return _COLOURS[f"c{index % 7}"], MARKERS[index % len(MARKERS)]


def _svg(figure: Figure, attributes: str) -> str:
    """The figure as an <svg> element of a page. Ids and clip paths are removed because a page's charts would share them; an id
    that starts with "tooltip" becomes a tooltip."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = stream.getvalue()
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return text.replace("<svg", f"<svg {attributes}", 1)


def panel_grid(
    count: int, columns: int, size: tuple[float, float], extra: float, share: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of panels, at most `columns` in a row. size: of a panel, in inches; extra: height of title and legend;
    share: the axes."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(5.6, size[0] * columns), size[1] * rows + extra), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).flat)
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels[:count]


def density_axis(panel: Axes, densities: Sequence[float]) -> None:
    """A log scale with ticks in percent around these densities, at least a factor of 4.8 wide so that it holds several."""
    positive = [density for density in densities if density > 0] or [1.0]
    low, high = min(positive), max(positive)
    reach = max(2.2, 1.3 * math.sqrt(high / low))
    middle = math.sqrt(low * high)
    panel.set_xscale("log")
    panel.set_xlim(middle / reach, min(middle * reach, max(1.15, 1.1 * high)))
    panel.xaxis.set_major_locator(FixedLocator([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    panel.set_xlabel("density (share of keys attended, log scale)")
