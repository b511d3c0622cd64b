"""Score against density as inline SVG: a curve a masker combination through its budgets, with 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from benchmark.report.data import Group, ResultRow

WIDTH, HEIGHT = 460, 310
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 12, 46
COLOURS = 7
_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def families(groups: Sequence[Group]) -> list[str]:
    """Masker combinations in the order of their colours."""
    return list(dict.fromkeys(row.family for group in groups for row in group.rows if not row.is_dense))


def chart(group: Group, names: Sequence[str]) -> str:
    """The SVG of one group; "" if no sparse row has both a score and a density."""
    points = [row for row in group.rows if not row.is_dense and row.figure("density") and row.figure("score") is not None]
    if not points:
        return ""
    low, high = _span([row.figure("density") or 1.0 for row in points])
    step, steps = _scale([row for row in group.rows if row.figure("score") is not None])
    top = step * steps

    def x(density: float) -> float:
        share = (math.log(density) - math.log(low)) / (math.log(high) - math.log(low))
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(score: float) -> float:
        return HEIGHT - _BOTTOM - score / top * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"score against density, {group.task}")}">']
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    for number in range(steps + 1):
        value = step * number
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2g}</text>')
    for tick in _TICKS:
        if low <= tick <= high:
            parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{_TOP}" y2="{bottom}"/>')
            parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{100 * tick:g}%</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">density (share of keys attended, log scale)</text>')
    metric = escape(str(group.rows[0].metrics["metric"]))
    place = (_TOP + bottom) / 2
    parts.append(f'<text transform="translate(12 {place}) rotate(-90)" text-anchor="middle">score ({metric})</text>')
    dense = group.dense
    if dense is not None and (score := dense.figure("score")) is not None:
        if dense.metrics["interval"]:
            ends = [y(value) for value in dense.metrics["interval"]]
            parts.append(
                f'<rect class="band" x="{_LEFT}" width="{right - _LEFT}" y="{ends[1]:.1f}" height="{max(1.0, ends[0] - ends[1]):.1f}"/>'
            )
        parts.append(f'<line class="dense" x1="{_LEFT}" x2="{right}" y1="{y(score):.1f}" y2="{y(score):.1f}"/>')
    for place, name in enumerate(names):
        own = sorted((row for row in points if row.family == name), key=lambda row: row.figure("density") or 0.0)
        if not own:
            continue
        colour = place % COLOURS
        at = [(x(row.figure("density") or 1.0), y(row.figure("score") or 0.0)) for row in own]
        if len(at) > 1:
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
            parts.append(f'<polyline class="curve s{colour}" points="{line}"/>')
        for row, (a, b) in zip(own, at, strict=True):
            parts.append(f"<g><title>{escape(_told(row))}</title>")
            if row.metrics["interval"]:
                lower, upper = (y(value) for value in row.metrics["interval"])
                whisker = f"M{a:.1f} {lower:.1f}V{upper:.1f}M{a - 4:.1f} {lower:.1f}h8M{a - 4:.1f} {upper:.1f}h8"
                parts.append(f'<path class="whisker s{colour}" d="{whisker}"/>')
            parts.append(f"{marker(place, a, b)}</g>")
    return "".join([*parts, "</svg>"])


def legend(names: Sequence[str], has_dense: bool) -> str:
    """An HTML list: every combination's marker, and dense attention's line."""
    items = [
        f'<li><svg viewBox="0 0 26 14" aria-hidden="true"><line class="curve s{place % COLOURS}" x1="1" x2="25" y1="7" y2="7"/>'
        f"{marker(place, 13, 7)}</svg>{escape(name)}</li>"
        for place, name in enumerate(names)
    ]
    if has_dense:
        items.append(
            '<li><svg viewBox="0 0 26 14" aria-hidden="true"><rect class="band" x="0" y="2" width="26" height="10"/>'
            '<line class="dense" x1="0" x2="26" y1="7" y2="7"/></svg>dense, with its interval</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def marker(place: int, x: float, y: float) -> str:
    """The marker of the combination at this place, around (x, y)."""
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"',
        f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"',
        f'<path d="M{x:.1f} {y - 5.2:.1f}l5 8.8h-10z"',
        f'<path d="M{x:.1f} {y - 5.6:.1f}l5.6 5.6l-5.6 5.6l-5.6 -5.6z"',
        f'<path d="M{x:.1f} {y + 5.2:.1f}l5 -8.8h-10z"',
        f'<path d="M{x - 1.8:.1f} {y - 5:.1f}h3.6v3.2h3.2v3.6h-3.2v3.2h-3.6v-3.2h-3.2v-3.6h3.2z"',
    )
    return f'{shapes[place % len(shapes)]} class="f{place % COLOURS}"/>'


def _told(row: ResultRow) -> str:
    interval = row.metrics["interval"]
    sure = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return f"{row.name}: score {row.figure('score'):.3f}{sure} at density {100 * (row.figure('density') or 0.0):.1f}%"


def _span(densities: Sequence[float]) -> tuple[float, float]:
    """Ends of the density axis: at least a factor of four apart, so that ticks have room."""
    low, high = min(densities) / 1.3, max(densities) * 1.3
    while high / low < 4:
        low, high = low / 1.2, high * 1.2
    return low, min(high, 1.15)


def _scale(rows: Sequence[ResultRow]) -> tuple[float, int]:
    """(step, steps) of the score axis, up to the highest interval: at most five steps, never above 1."""
    highest = max(
        [row.figure("score") or 0.0 for row in rows] + [row.metrics["interval"][1] for row in rows if row.metrics["interval"]]
    )
    for step in (0.02, 0.05, 0.1, 0.2):
        count = max(1, math.ceil(highest / step - 1e-9))
        if count <= 5:
            return step, count
    return 0.2, 5
