"""The table at the end of a run."""

from __future__ import annotations

from typing import Any

WIDTH = 100
_NAME = 42


def closing_table(summary: dict[str, Any]) -> str:
    """The scores of a `benchmark_summary.json`, at most 100 columns: a block for each (model, task), a line for each
    configuration: score and 95% interval, density, attention error, paired difference to dense and its interval.

    "!" marks a configuration that read more than a tenth above its budget, "?" one of which samples failed or are
    missing, "~" one that met no budget in the search.
    """
    blocks: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in summary.get("results", []):
        blocks.setdefault((result["model"], result["task"]), []).append(result)
    lines: list[str] = []
    marks: set[str] = set()
    for (model, task), results in blocks.items():
        total = results[0]["samples"]["total"]
        lines += [_cut(f"{task}  ({results[0]['metric']}, {total} sample{'s' * (total != 1)}, {model})", WIDTH)]
        columns = f"{'score':>5} {'95% interval':>12} {'density':>7} {'error':>5} {'to dense':>20}"
        head = f" {'configuration':<{_NAME}} {columns}"
        lines += [head, " " + "-" * (len(head) - 1)]
        for result in results:
            mark = _mark(result)
            marks |= set(mark)
            lines.append(
                f" {_cut(result['configuration'], _NAME):<{_NAME}} {_number(result['score'], 3):>5}"
                f" {_interval(result['interval']):>12} {_number(result['density'], 3):>7}"
                f" {_number(result['error'], 3)[:5]:>5} {_difference(result):>20} {mark}".rstrip()
            )
        lines.append("")
    told = {
        "!": "! density passes the budget by more than a tenth",
        "?": "? samples failed or are missing: see metrics.json",
        "~": "~ no configuration met this budget in the search: the closest was run",
    }
    lines += [text for sign, text in told.items() if sign in marks]
    return "\n".join(lines).rstrip()


def _mark(result: dict[str, Any]) -> str:
    samples = result["samples"]
    mark = "!" if result.get("over_budget") else ""
    if result.get("meets_budget") is False:
        mark += "~"
    return mark + ("?" if samples["failed"] or samples["missing"] else "")


def _difference(result: dict[str, Any]) -> str:
    found = result.get("difference_to_dense")
    if not found:
        return "-"
    text = f"{found['difference']:+.3f}"
    return f"{text} {_interval(found['interval'])}" if found["interval"] else text


def _interval(interval: list[float] | tuple[float, float] | None) -> str:
    return "-" if not interval else f"[{interval[0]:.2f}, {interval[1]:.2f}]"


def _number(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def _cut(text: str, width: int) -> str:
    """Shorten in the middle: the end of a name holds its budget."""
    if len(text) <= width:
        return text
    tail = width // 2 - 1
    return f"{text[: width - tail - 2]}..{text[-tail:]}"
