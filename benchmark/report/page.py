"""The report of a results folder as one HTML file: answers first, then every figure, then exactly what was run.

The templates lie beside this file. A page includes its style, script and charts, and loads nothing from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from benchmark.report.chart import chart, families, legend
from benchmark.report.data import BYTES_SLACK, Group, ResultRow, Tree, choose, compare_trees, read_tree, run_again
from benchmark.report.table import difference, interval, marks, number, percent
from benchmark.stats import SIGNIFICANT
from benchmark.storage.records import Versions
from benchmark.storage.results import write_text

#: Below this number of samples a page says that they are few.
FEW_SAMPLES = 30


def write_report(results_dir: Path, output: Path | None = None) -> Path:
    """Write the report of all results in a folder.

    Parameters
    ----------
    results_dir : Path
        A benchmark results folder.
    output : Path, optional
        The file to write, by default `report.html` in `results_dir`.

    Returns
    -------
    Path
        The written file.

    Raises
    ------
    UserError
        If the folder holds no results, or a file in it cannot be read.
    """
    path = output or results_dir / "report.html"
    write_text(path, report_page(read_tree(results_dir)))
    return path


def write_comparison(first: Path, second: Path, output: Path | None = None) -> Path:
    """Write the comparison of two results folders, by default to `comparison.html` in the current folder, and return its path.
    Errors: as `write_report`."""
    path = output or Path("comparison.html")
    write_text(path, comparison_page(read_tree(first), read_tree(second)))
    return path


def report_page(tree: Tree) -> str:
    """The HTML of the report of one results folder."""
    names = families(tree.groups)
    parts = [
        {
            "title": _title(tree.groups, group.model, group.task, group.sparse_from),
            "group": group,
            "rows": [*group.rows, *group.others],
            "dense_score": group.dense.figure("score") if group.dense else None,
            "choices": [(budget, choose(group, budget)) for budget in group.budgets],
            "chart": chart(group, names),
            "longest": max([row.figure("seconds") or 0.0 for row in group.rows], default=0.0) or 1.0,
            "facts": _facts(group),
        }
        for group in tree.groups
    ]
    return _PAGES.get_template("page_report.html").render(
        tree=tree,
        parts=parts,
        answers=sum(row.samples.ok for row in tree.rows),
        missing=sum(row.samples.missing for row in tree.rows),
        failures=tree.failures(),
        legend=legend(names, any(group.dense for group in tree.groups)),
        run_again=run_again,
        slack=BYTES_SLACK,
    )


def comparison_page(first: Tree, second: Tree) -> str:
    """The HTML of two results folders side by side: scores, densities, and the paired difference B - A."""
    groups = [*first.groups, *second.groups]
    entries = [{**vars(entry), "title": _title(groups, *entry.key[:3])} for entry in compare_trees(first, second)]
    paired = [found for entry in entries if (found := entry["comparison"])]
    return _PAGES.get_template("page_comparison.html").render(
        first=first,
        second=second,
        entries=entries,
        changed=sorted({name for entry in entries for name in entry["changed"]}),
        paired=paired,
        certain=sum(
            bool(found.interval) and not found.interval[0] <= 0 <= found.interval[1] and (found.p_value or 1) <= SIGNIFICANT
            for found in paired
        ),
        figures=[("density", percent), ("error", number), ("reference_nll", number)],
    )


def _title(groups: Sequence[Group], model: str, task: str, sparse_from: str) -> str:
    """The task, with the model and the protocol where the page holds several."""
    title = f"{task} on {model}" if len({group.model for group in groups}) > 1 else task
    return f"{title}, sparse from {sparse_from}" if len({group.sparse_from for group in groups}) > 1 else title


def _facts(group: Group) -> list[tuple[str, str]]:
    rows = [*group.rows, *group.others]
    configs = [row.config for row in rows]

    def every(name: str) -> str:
        return ", ".join(dict.fromkeys(str(value) for config in configs if (value := getattr(config, name)) is not None)) or "-"

    def packages(versions: Versions) -> str:
        return ", ".join(f"{name} {found}" for name, found in sorted(versions.items()) if found and name != "commit")

    samples = [row.samples for row in group.rows]
    total, cut = (max(getattr(counts, name) for counts in samples) for name in ("total", "truncated"))
    capped = sum(counts.capped for counts in samples)
    return [
        ("model", group.model),
        ("task", f"{group.task}, metric {group.rows[0].metrics.metric}"),
        ("configurations", ", ".join(row.name for row in rows)),
        ("samples", f"{total}; contexts cut to fit: {cut}; answers capped: {capped}"),
        ("sparse from", group.sparse_from),
        ("seed", every("seed")),
        ("search run", every("config_run")),
        ("context, new tokens", f"at most {every('max_context_length')} and {every('max_new_tokens')}"),
        ("device, precision", f"{every('device')}, {every('dtype')}"),
        ("attention, prefill", f"{every('attention_backend')}, {every('dense_backend')}"),
        *(("versions", found) for found in dict.fromkeys(packages(config.versions) for config in configs)),
        ("commit", ", ".join(dict.fromkeys(str(config.versions.get("commit")) for config in configs))),
    ]


# -- filters of the templates ----------------------------------------------------------------------------------------


def _confidence(row: ResultRow) -> str:
    """What the samples of a row show about its difference to dense attention."""
    paired = row.metrics.difference_to_dense
    n = paired.n if paired else row.samples.ok
    samples = f"{n} sample{'s' * (n != 1)}"
    few = f" {samples} are few: run more (--max-requests)." if n < FEW_SAMPLES else ""
    if not paired or not paired.interval:
        return f"How sure: {samples} on which both scored, too little for an interval.{few if n > 1 else ''}"
    low, high = paired.interval
    better, worse = paired.better, paired.worse
    counts = f"{better} better, {worse} worse, {n - better - worse} alike of {samples}"
    if better == worse == 0:
        # With no differing sample among n, a share of up to 1 - 0.05^(1/n) of all samples could still differ (95%).
        unseen = 1 - 0.05 ** (1 / n)
        return (
            f"How sure: no sample scored otherwise than dense ({counts}); up to {unseen:.0%} of all samples still could.{few}"
        )
    sure = paired.p_value is not None and paired.p_value <= SIGNIFICANT
    if high < 0 and sure:
        return f"How sure: the cost is real, its interval excludes 0 ({counts}, p = {paired.p_value:.2g}).{few}"
    if low > 0 and sure:
        return f"How sure: better than dense, the interval excludes 0 ({counts}, p = {paired.p_value:.2g}).{few}"
    return f"How sure: no difference is shown ({counts}).{few}"


def _marked(row: ResultRow) -> str:
    return f"{row.name} {marks(row.metrics.over_budget, row.meets_budget(), row.samples)}".rstrip()


def _when(tree: Tree) -> str:
    """The models of a results folder and the time of its last run."""
    models = ", ".join(dict.fromkeys(group.model for group in tree.groups))
    stamp = tree.summary.timestamp if tree.summary else None
    return f"{models}; last run {stamp}" if stamp else models


def _breakable(text: str) -> Markup:
    """Lets the browser break a line after "_" and "/"."""
    return escape(text).replace("_", Markup("_<wbr>")).replace("/", Markup("/<wbr>"))


_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,  # a value that a template misses is an error, not an empty text
    trim_blocks=True,
    lstrip_blocks=True,
)
_PAGES.filters |= {
    "breakable": _breakable,
    "confidence": _confidence,
    "difference": difference,
    "interval": interval,
    "json": lambda record: record.model_dump_json(),
    "marked": _marked,
    "number": number,
    "percent": percent,
    "when": _when,
}
