"""The table printed at the end of a benchmark, and the number formats that every table and page of a report shares."""

from __future__ import annotations

import math

from benchmark.settings import DENSE
from benchmark.storage.benchmark_records import Difference, ResultRow, SampleCounts, Summary
from benchmark.storage.records import Interval

WIDTH = 100
_NAME = 42
_LEGEND = {
    "!": "! density (KV bytes with --budget-on kv) passes the budget by more than a tenth",
    "?": "? samples failed or are missing: see metrics.json",
    "~": "~ no configuration met this budget in the search: the closest was run",
}


def closing_table(summary: Summary) -> str:
    """The scores in a summary, at most 100 columns wide.

    One block per (model, task), one line per configuration: score and its 95% interval, density, attention error, paired
    difference to dense and its interval. A legend explains the marks that occur; see `marks`.
    """
    blocks: dict[tuple[str, str], list[ResultRow]] = {}
    for row in summary.results:
        blocks.setdefault((row.model, row.task), []).append(row)
    lines: list[str] = []
    used: set[str] = set()
    columns = f"{'score':>5} {'95% interval':>12} {'density':>7} {'error':>5} {'to dense':>20}"
    head = f" {'configuration':<{_NAME}} {columns}"
    for (model, task), rows in blocks.items():
        total = rows[0].samples.total
        lines += [shorten(f"{task}  ({rows[0].metric}, {total} sample{'s' * (total != 1)}, {model})", WIDTH)]
        lines += [head, " " + "-" * (len(head) - 1)]
        for row in rows:
            mark = marks(row.over_budget, row.meets_budget, row.samples)
            used |= set(mark)
            lines.append(
                f" {shorten(row.configuration, _NAME):<{_NAME}} {number(row.score):>5}"
                f" {interval(row.interval) or '-':>12} {number(row.density):>7}"
                f" {number(row.error)[:5]:>5} {difference(row.difference_to_dense):>20} {mark}".rstrip()
            )
        if any(row.configuration == DENSE and row.score == 0 for row in rows):
            lines.append(" dense fails here: no conclusion about sparse attention")
        thinking = [f"{row.configuration} {count}" for row in rows if (count := row.samples.never_left_thinking)]
        if thinking:
            lines.append(shorten(f" answers that never left their thinking: {', '.join(thinking)}", WIDTH))
        lines.append("")
    lines += [text for mark, text in _LEGEND.items() if mark in used]
    return "\n".join(lines).rstrip()


def marks(over_budget: bool | None, meets_budget: bool | None, samples: SampleCounts) -> str:
    """The warning marks of a result: "!" measured density far above the budget, "~" budget not met in the search, "?" samples
    failed or missing."""
    return "!" * bool(over_budget) + "~" * (meets_budget is False) + "?" * bool(samples.failed or samples.missing)


def difference(paired: Difference | None) -> str:
    """A paired difference with its interval; "-" for None."""
    return f"{paired.difference:+.3f} {interval(paired.interval)}".strip() if paired else "-"


def interval(ends: Interval | None) -> str:
    return f"[{ends[0]:.2f}, {ends[1]:.2f}]" if ends else ""


def number(value: float | None) -> str:
    """Three decimals; "-" for None and NaN, as in `percent`."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def percent(value: float | None, places: int = 1) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.{places}f}%"


def shorten(text: str, width: int) -> str:
    """Cut out the middle: names start with their maskers and end with their budget."""
    if len(text) <= width:
        return text
    tail = width // 2 - 1
    return f"{text[: width - tail - 2]}..{text[-tail:] if tail else ''}"
