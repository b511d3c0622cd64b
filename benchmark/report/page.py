"""The report as one HTML page: answers first, then every figure, then exactly what was run. Nothing is loaded from anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmark.report.chart import chart, families, legend
from benchmark.report.data import BYTES_SLACK, Choice, Group, ResultRow, Tree, choose, compare_trees, run_again

#: Below so many samples a page says that they are few.
FEW_SAMPLES = 30
_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def report_page(tree: Tree) -> str:
    """The report of one results tree."""
    names = families(tree.groups)
    counted = sum(row.samples["ok"] for row in tree.rows)
    pairs = len(tree.groups)
    parts = [
        "<h1>Which sparse attention keeps the answers, at which budget?</h1>",
        f'<p class="soft">{pairs} task{"s" * (pairs != 1)}, {len(tree.rows)} results, {counted} scored answers. '
        f"{escape(_when(tree))}</p>",
        _answers(tree),
        "<h2>Every result</h2>",
        '<p class="soft">Click a column\'s head to sort. Intervals are 95%. <b>To dense</b>: paired difference on the same samples. '
        "<b>Density</b>: share of keys attended. <b>KV bytes</b>: share of dense attention's reads, selector included. "
        "<b>Error</b>: of the attention output, relative. <b>Reference NLL</b>: negative log-likelihood of the right answer, in nats a "
        "token; lower is better. Marks: ! density passes the budget by more than a tenth, ~ the search met no such budget, "
        "? samples failed or are missing.</p>",
        _results_table(tree),
        "<h2>Score against density</h2>",
        legend(names, any(group.dense for group in tree.groups)),
        '<div class="cards">',
        *(_chart_card(group, tree, names) for group in tree.groups),
        "</div>",
        "<h2>Time to answer</h2>",
        '<p class="soft">Mean seconds from asking a question to its last token. Configurations of a sample are answered together as one '
        "batch where memory allows, so these tell how long a run takes, not how fast a method is by itself.</p>",
        _times(tree),
        "<h2>Failures</h2>",
        _failures(tree),
        "<h2>What was run</h2>",
        *(_ran(group, tree) for group in tree.groups),
        _notes(tree),
    ]
    return _page("Sparse attention report", parts)


def comparison_page(first: Tree, second: Tree) -> str:
    """Two results trees side by side: scores, densities, and the paired difference B - A."""
    found = compare_trees(first, second)
    head = [
        "Task",
        "Configuration",
        "Score A",
        "Score B",
        "B - A",
        "Density A",
        "Density B",
        "Error A",
        "Error B",
        "NLL A",
        "NLL B",
    ]
    rows = []
    for entry in found:
        model, task, protocol, name = entry["key"]
        a, b = entry["a"], entry["b"]
        cells = [_text(_task(task, model, protocol, [*first.groups, *second.groups])), _text(name, "name")]
        cells += [_score(row) for row in (a, b)]
        compared = entry["comparison"]
        told = _difference(compared.to_dict()) if compared else ("only in " + ("A" if b is None else "B"))
        told = told if compared or a is None or b is None else "other samples"
        cells.append(_cell(told, compared.difference if compared else None))
        for figure, show in (("density", _percent), ("error", _number), ("reference_nll", _number)):
            values = [row.figure(figure) if row else None for row in (a, b)]
            cells += [_cell(show(value), value) for value in values]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    both = [entry for entry in found if entry["comparison"]]
    surely = [
        e for e in both if e["comparison"].interval and not e["comparison"].interval[0] <= 0 <= e["comparison"].interval[1]
    ]
    changed = sorted({name for entry in found for name in entry["changed"]})
    parts = [
        "<h1>Two runs compared</h1>",
        f"<dl><dt>A</dt><dd>{escape(str(first.folder))}, {escape(_when(first))}</dd>"
        f"<dt>B</dt><dd>{escape(str(second.folder))}, {escape(_when(second))}</dd>"
        f"<dt>Differ in</dt><dd>{escape(', '.join(changed) or 'nothing that is recorded')}</dd></dl>",
        f"<p>{len(both)} of {len(found)} results answered the same samples in both; the interval of the difference excludes 0 in "
        f"{len(surely)} of them.</p>",
        '<p class="soft">B - A: paired difference of the score on the same samples with its 95% interval.</p>',
        _table(head, rows, text=2),
    ]
    return _page("Two runs compared", parts)


# -- answers ---------------------------------------------------------------------------------------------------------


def _answers(tree: Tree) -> str:
    parts = [
        "<h2>What to use</h2>",
        '<p class="soft">For each task and density budget: the configuration with the best score among those whose measured density '
        "keeps the budget (to a tenth); ties go to the smaller reference NLL, then to the fewer keys.</p>",
    ]
    for group in tree.groups:
        parts.append(f"<h3>{escape(_group_name(group, tree))}</h3>")
        choices = [(budget, choose(group, budget)) for budget in group.budgets]
        if not choices:
            parts.append("<p>No configuration with a budget was run.</p>")
            continue
        cards = [_answer(group, budget, choice) for budget, choice in choices]
        parts.append(f'<div class="cards">{"".join(cards)}</div>')
    return "".join(parts)


def _answer(group: Group, budget: float, choice: Choice | None) -> str:
    head = f'<span class="badge">at {100 * budget:g}% density</span>'
    if choice is None:
        return f'<div class="card">{head}<p>No scored configuration keeps this budget.</p></div>'
    best = choice.best
    lines = [
        f'<p class="use">{_breakable(best.name)}</p>',
        f"<p>{_cost(group, best)}</p>",
        f'<p class="soft">{_sureness(best)}</p>',
    ]
    lines.append(f'<p class="soft">{_against_next(choice)}</p>')
    read = best.figure("kv_fraction")
    told = f"Measured density {_percent(best.figure('density'))}"
    if read is not None:
        told += f"; reads {_percent(read)} of the dense KV bytes"
        if read > BYTES_SLACK * budget:
            told += ", its selector included: it shows what quality is in reach, it does not save those reads"
    lines.append(f'<p class="soft">{told}.</p>')
    if choice.light is not None:
        light = choice.light
        lines.append(
            f'<p class="soft">Best that reads at most {100 * BYTES_SLACK * budget:g}% of the bytes: <b>{_breakable(light.name)}</b>, '
            f"{_cost(group, light)}</p>"
        )
    lines.append(
        f"<details><summary>Run it again</summary><pre>{escape(run_again([best]))}</pre>"
        '<p class="soft">From the root of a checkout, with the search run in ./optimal_configs (--optimal-configs-dir names another '
        "place). Answers that are there already are reused; --force-benchmark answers again.</p>"
        f"<p class='soft'>Its settings, for <code>ResearchAttentionConfig.from_dict</code>:</p>"
        f"<pre>{escape(json.dumps(best.config['sparse_config']))}</pre></details>"
    )
    return f'<div class="card">{head}{"".join(lines)}</div>'


def _cost(group: Group, row: ResultRow) -> str:
    score = f"score <b>{_number(row.figure('score'))}</b> {_interval(row.metrics['interval'])}"
    found = row.metrics.get("difference_to_dense")
    dense = group.dense.figure("score") if group.dense else None
    if not found or dense is None:
        return f"{score}; dense attention was not run on these samples, so its cost is not known."
    if not found["interval"]:
        return f"{score}; {found['difference']:+.3f} against dense ({dense:.3f})."
    return f"{score}; against dense ({dense:.3f}): <b>{_difference(found)}</b>."


def _sureness(row: ResultRow) -> str:
    found = row.metrics.get("difference_to_dense")
    n = found["n"] if found else row.samples["ok"]
    samples = f"{n} sample{'s' * (n != 1)}"
    few = f" {samples} are few: run more (--max-requests)." if n < FEW_SAMPLES else ""
    if not found or not found["interval"]:
        return f"How sure: {samples}, too little for an interval.{few if n > 1 else ''}"
    low, high = found["interval"]
    counts = f"{found['better']} better, {found['worse']} worse, {n - found['better'] - found['worse']} alike of {samples}"
    if low == high == 0:
        # No sample differed: a share of up to 1 - 0.05^(1/n) of all samples could, without showing in these (95%).
        unseen = 1 - 0.05 ** (1 / n)
        return (
            f"How sure: no sample scored otherwise than dense ({counts}); up to {unseen:.0%} of all samples still could.{few}"
        )
    if low == high:
        return f"How sure: every sample differs alike ({counts}).{few}"
    if high < 0:
        return f"How sure: the cost is real, its interval excludes 0 ({counts}).{few}"
    if low > 0:
        return f"How sure: better than dense, the interval excludes 0 ({counts}).{few}"
    return f"How sure: no difference is shown; the interval holds 0 ({counts}).{few}"


def _against_next(choice: Choice) -> str:
    other, margin = choice.runner_up, choice.margin
    if other is None:
        return "Nothing else that was run keeps this budget."
    name = f"<b>{_breakable(other.name)}</b>"
    if margin is None:
        return f"Next: {name}, score {_number(other.figure('score'))}; no sample was scored under both."
    if margin.better == margin.worse == 0:
        return f"Next: {name}, alike on every sample."
    if margin.interval and margin.interval[0] > 0:
        return f"Next: {name}, behind it by {_difference(margin.to_dict())}."
    return f"Next: {name}; the samples do not tell the two apart ({_difference(margin.to_dict())})."


# -- tables and charts -----------------------------------------------------------------------------------------------


def _results_table(tree: Tree) -> str:
    head = [
        "Task",
        "Configuration",
        "Score",
        "95% interval",
        "To dense",
        "Density",
        "KV bytes",
        "Error",
        "Reference NLL",
        "Samples",
    ]
    rows = []
    for group in tree.groups:
        for row in [*group.rows, *group.strangers]:
            found = None if row.is_dense else row.metrics.get("difference_to_dense")
            interval = row.metrics["interval"]
            marks = _marks(row, row in group.strangers)
            cells = [
                _text(_group_name(group, tree), "name"),
                _text(f"{row.name}{marks}", "name"),
                _cell(_number(row.figure("score")), row.figure("score")),
                _cell(_interval(interval), interval[0] if interval else None),
                _cell(_difference(found) if found else "-", found["difference"] if found else None),
                _cell(_percent(row.figure("density")), row.figure("density")),
                _cell(_percent(row.figure("kv_fraction")), row.figure("kv_fraction")),
                _cell(_number(row.figure("error")), row.figure("error")),
                _cell(_number(row.figure("reference_nll")), row.figure("reference_nll")),
                _cell(f"{row.samples['ok']} of {row.samples['total']}", row.samples["ok"]),
            ]
            kind = ' class="dense"' if row.is_dense else ""
            rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return _table(head, rows, text=2)


def _marks(row: ResultRow, stranger: bool) -> str:
    marks = "!" if row.metrics.get("over_budget") else ""
    marks += "~" if row.meets_budget() is False else ""
    marks += "?" if row.samples["failed"] or row.samples["missing"] else ""
    return (f" {marks}" if marks else "") + (" (other samples)" if stranger else "")


def _chart_card(group: Group, tree: Tree, names: Sequence[str]) -> str:
    drawn = chart(group, names) or "<p>No sparse result has a score.</p>"
    return f'<div class="card"><h3 style="margin-top:0">{escape(_group_name(group, tree))}</h3>{drawn}</div>'


def _times(tree: Tree) -> str:
    head = ["Task", "Configuration", "Seconds", ""]
    rows = []
    for group in tree.groups:
        longest = max((row.figure("seconds") or 0.0 for row in group.rows), default=0.0) or 1.0
        for row in group.rows:
            seconds = row.figure("seconds")
            bar = f'<span class="bar" style="width:{100 * (seconds or 0.0) / longest:.1f}%"></span>'
            cells = [_text(_group_name(group, tree), "name"), _text(row.name, "name")]
            cells += [_cell("-" if seconds is None else f"{seconds:.2f} s", seconds), f'<td class="bars">{bar}</td>']
            kind = " class='dense'" if row.is_dense else ""
            rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return _table(head, rows, text=2)


def _failures(tree: Tree) -> str:
    found = tree.failures()
    missing = sum(row.samples["missing"] for row in tree.rows)
    note = (
        f'<p class="warn">{missing} answers are missing: the run was stopped; the same command goes on.</p>' if missing else ""
    )
    if not found:
        return f"{note}<p>None: every answer that was asked for was given and scored.</p>" if not missing else note
    rows = [
        "<tr>"
        + "".join(
            _text(str(entry.get(name) or "-"), "name")
            for name in ("model", "task", "configuration", "sample_id", "status", "problem")
        )
        + "</tr>"
        for entry in found[:200]
    ]
    more = f"<p>... and {len(found) - 200} more, in each metrics.json.</p>" if len(found) > 200 else ""
    return note + _table(["Model", "Task", "Configuration", "Sample", "Status", "Problem"], rows, text=6) + more


def _ran(group: Group, tree: Tree) -> str:
    configs = [row.config for row in [*group.rows, *group.strangers]]

    def every(name: str) -> str:
        return ", ".join(dict.fromkeys(str(config.get(name)) for config in configs if config.get(name) is not None)) or "-"

    versions = dict.fromkeys(json.dumps(config["versions"], sort_keys=True) for config in configs)
    samples = [row.samples for row in group.rows]
    cut = max((s.get("truncated", 0) for s in samples), default=0)
    capped = sum(s.get("capped", 0) for s in samples)
    facts = [
        ("model", group.model),
        ("task", f"{group.task}, metric {group.rows[0].metrics['metric']}"),
        ("configurations", ", ".join(row.name for row in [*group.rows, *group.strangers])),
        ("samples", f"{max((s['total'] for s in samples), default=0)}; contexts cut to fit: {cut}; answers capped: {capped}"),
        ("sparse from", group.sparse_from),
        ("seed", every("seed")),
        ("search run", every("config_run")),
        ("context, new tokens", f"at most {every('max_context_length')} and {every('max_new_tokens')}"),
        ("device, precision", f"{every('device')}, {every('dtype')}"),
        ("attention, prefill", f"{every('attention_backend')}, {every('dense_backend')}"),
        *(("versions", ", ".join(f"{k} {v}" for k, v in json.loads(told).items() if v and k != "commit")) for told in versions),
        ("commit", ", ".join(dict.fromkeys(str(config["versions"].get("commit")) for config in configs))),
    ]
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return (
        f"<details><summary>{escape(_group_name(group, tree))}</summary><dl>{listed}</dl>"
        f'<p class="soft">All of it again:</p><pre>{escape(run_again(group.rows))}</pre></details>'
    )


def _notes(tree: Tree) -> str:
    notes = [str(note) for note in tree.summary.get("notes", [])]
    return "" if not notes else "<h3>Notes of the last run</h3><ul>" + "".join(f"<li>{escape(n)}</li>" for n in notes) + "</ul>"


# -- small parts -----------------------------------------------------------------------------------------------------


def _page(title: str, parts: Iterable[str]) -> str:
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + f"\n</main>\n<script>\n{script}</script>\n</body></html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[str], text: int) -> str:
    """text: so many columns at the left hold words. A head of "" cannot be sorted by."""

    def heading(place: int, name: str) -> str:
        kind = " class='text'" if place < text else ""
        button = f"<button type='button'>{escape(name)}</button>" if name else ""
        return f"<th scope='col'{kind}>{button}</th>"

    heads = [heading(place, name) for place, name in enumerate(head)]
    return (
        '<div class="scroll" tabindex="0"><table class="sortable"><thead><tr>'
        f"{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _text(text: str, extra: str = "") -> str:
    return f'<td class="text {extra}" data-v="{escape(text)}">{_breakable(text)}</td>'


def _breakable(text: str) -> str:
    """Escaped, with leave to break a line after "_" and "/"."""
    return escape(text).replace("_", "_<wbr>").replace("/", "/<wbr>")


def _cell(text: str, value: float | None) -> str:
    return f'<td data-v="{"" if value is None else repr(float(value))}">{escape(text)}</td>'


def _score(row: ResultRow | None) -> str:
    if row is None:
        return _cell("-", None)
    return _cell(f"{_number(row.figure('score'))} {_interval(row.metrics['interval'])}".strip(), row.figure("score"))


def _group_name(group: Group, tree: Tree) -> str:
    return _task(group.task, group.model, group.sparse_from, tree.groups)


def _task(task: str, model: str, protocol: str, groups: Sequence[Group]) -> str:
    """The task's name, with the model and the protocol where a page holds several."""
    name = task
    if len({group.model for group in groups}) > 1:
        name += f" on {model}"
    return name + (f", sparse from {protocol}" if len({group.sparse_from for group in groups}) > 1 else "")


def _when(tree: Tree) -> str:
    models = ", ".join(dict.fromkeys(group.model for group in tree.groups))
    stamp = tree.summary.get("timestamp")
    return f"{models}" + (f"; last run {stamp}" if stamp else "")


def _difference(found: dict[str, Any]) -> str:
    return f"{found['difference']:+.3f} {_interval(found['interval'])}".strip()


def _interval(interval: Sequence[float] | None) -> str:
    return f"[{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
