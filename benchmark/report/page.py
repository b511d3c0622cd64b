"""The report of a results folder as one HTML file: answers first, then every figure, then exactly what was run.

The templates are in this folder. A page contains its style, script and charts, and loads nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from benchmark.report import data
from benchmark.report.chart import budget_chart, chart, families, legend
from benchmark.report.data import Group, Pick, ResultRow, Tree
from benchmark.report.table import difference, interval, marks, number, percent
from benchmark.stats import LEVEL, SIGNIFICANT
from benchmark.storage.records import Versions
from benchmark.storage.results import write_text

#: Below this number of samples a page says that they are few.
FEW_SAMPLES = 30


def write_report(results_dir: Path, output: Path | None = None) -> Path:
    """Write the report of all results in a folder to `output`, by default its `report.html`, and return that path.

    UserError if the folder holds no results that can be read."""
    path = output or results_dir / "report.html"
    write_text(path, report_page(data.read_tree(results_dir)))
    return path


def write_comparison(first: Path, second: Path, output: Path | None = None) -> Path:
    """Write the comparison of two results folders, by default to `comparison.html` in the current folder, and return its path.
    Errors: as `write_report`."""
    path = output or Path("comparison.html")
    write_text(path, comparison_page(data.read_tree(first), data.read_tree(second)))
    return path


def report_page(tree: Tree) -> str:
    """The HTML of the report of one results folder."""
    names = families(tree.groups)
    parts = [
        {
            "title": _title(tree.groups, group.model, group.task, group.sparse_from)
            + ", budgets on KV bytes" * (group.budget_on == "kv"),
            "group": group,
            "rows": [*group.rows, *group.others],
            "dense": group.dense.metrics.score if group.dense else None,
            "choices": [(budget, data.choose(group, budget)) for budget in group.budgets],
            "chart": chart(group, names),
            "budget_chart": budget_chart(group, names),
            "longest": max([row.metrics.seconds or 0.0 for row in group.rows], default=0.0) or 1.0,
            "facts": _facts(group),
        }
        for group in tree.groups
    ]
    means = data.group_means(tree.groups)
    return _PAGES.get_template("page_report.html").render(
        tree=tree,
        parts=parts,
        means=[(_title(tree.groups, mean.model, mean.group, mean.sparse_from), mean) for mean in means],
        sizes={mean.group: _group_size(mean.group) for mean in means},
        answers=sum(row.metrics.samples.ok for row in tree.rows),
        missing=sum(row.metrics.samples.missing for row in tree.rows),
        failures=tree.failures(),
        legend=legend(names, any(group.dense for group in tree.groups)),
        run_again=data.run_again,
        slack=data.BYTES_SLACK,
    )


def comparison_page(first: Tree, second: Tree) -> str:
    """The HTML of two results folders side by side: scores, densities, and the paired difference B - A."""
    groups = [*first.groups, *second.groups]
    entries = [{**vars(entry), "title": _title(groups, *entry.key[:3])} for entry in data.compare_trees(first, second)]
    paired = [found for entry in entries if (found := entry["comparison"])]
    return _PAGES.get_template("page_comparison.html").render(
        first=first,
        second=second,
        entries=entries,
        changed=sorted({name for entry in entries for name in entry["changed"]}),
        paired=paired,
        certain=sum(
            bool(found.interval)
            and not found.interval[0] <= 0 <= found.interval[1]
            and found.p_value is not None
            and found.p_value <= SIGNIFICANT
            for found in paired
        ),
        figures=[("density", percent), ("error", number), ("reference_nll", number)],
    )


def _group_size(group: str) -> int | None:
    """How many tasks a group such as ruler/4096 has, data that are missing here included; None for an unknown one."""
    from benchmark.tasks import available_tasks

    # Groups of one benchmark have the same tasks; not every length is listed.
    names = [name for name in available_tasks() if name.startswith(f"{group.partition('/')[0]}/")]
    return max(Counter(name.rpartition("/")[0] for name in names).values(), default=None)


def _title(groups: Sequence[Group], model: str, task: str, sparse_from: str) -> str:
    """The task, with the model and the protocol if the page has several."""
    title = f"{task} on {model}" if len({group.model for group in groups}) > 1 else task
    return f"{title}, sparse from {sparse_from}" if len({group.sparse_from for group in groups}) > 1 else title


def _facts(group: Group) -> list[tuple[str, str]]:
    rows = [*group.rows, *group.others]
    configs = [row.config for row in rows]
    layers = [f"{found.sparse_layers} of {found.layers}" for row in rows if (found := row.metrics).layers is not None]

    def every(name: str) -> str:
        return ", ".join(dict.fromkeys(str(value) for config in configs if (value := getattr(config, name)) is not None)) or "-"

    def packages(versions: Versions) -> str:
        return ", ".join(f"{name} {found}" for name, found in sorted(versions.items()) if found and name != "commit")

    samples = [row.metrics.samples for row in group.rows]
    total, cut = (max(getattr(counts, name) for counts in samples) for name in ("total", "truncated"))
    capped = sum(counts.capped for counts in samples)
    return [
        ("model", group.model),
        ("task", f"{group.task}, metric {group.rows[0].metrics.metric}"),
        ("configurations", ", ".join(row.name for row in rows)),
        ("samples", f"{total}; contexts cut to fit: {cut}; answers capped: {capped}"),
        ("sparse from", group.sparse_from),
        *(("sparse layers", found) for found in layers[:1]),
        ("seed", every("seed")),
        ("search run", every("config_run")),
        ("context, new tokens", f"at most {every('max_context_length')} and {every('max_new_tokens')}"),
        ("device, precision", f"{every('device')}, {every('dtype')}"),
        ("attention, prefill", f"{every('attention_backend')}, {every('dense_backend')}"),
        *(("versions", found) for found in dict.fromkeys(packages(config.versions) for config in configs)),
        ("commit", ", ".join(dict.fromkeys(str(config.versions.get("commit")) for config in configs))),
    ]


# -- filters of the templates ----------------------------------------------------------------------------------------


def _confidence(pick: Pick) -> str:
    """What the samples show about the difference of a chosen row to dense attention."""
    paired, among = pick.to_dense, pick.candidates
    n = paired.n if paired else pick.row.metrics.samples.ok
    samples = f"{n} sample{'s' * (n != 1)}"
    few = f" {samples} are few: run more (--max-requests)." if n < FEW_SAMPLES else ""
    if paired is None:
        return f"How sure: not compared with dense attention, which was not run on these {samples}.{few}"
    if not paired.interval:
        return f"How sure: {samples} scored under both, too few for an interval.{few if n > 1 else ''}"
    low, high = paired.interval
    better, worse = paired.better, paired.worse
    counts = f"{better} better, {worse} worse, {n - better - worse} equal of {samples}"
    chosen = f" Chosen among {among} by these samples: the intervals hold for all {among} at once." if among > 1 else ""
    if better == worse == 0:
        # With no differing sample among n, a share of up to 1 - 0.05^(1/n) of all samples could still differ (95%).
        unseen = 1 - ((1 - LEVEL) / among) ** (1 / n)
        return (
            f"How sure: every sample scored as under dense attention ({counts}); up to {unseen:.0%} of all samples could still "
            f"score differently.{chosen}{few}"
        )
    p_value = min(1.0, (1.0 if paired.p_value is None else paired.p_value) * among)
    found = "no difference is shown"
    if p_value <= SIGNIFICANT and high < 0:
        found = "the cost is real, its interval excludes 0"
    elif p_value <= SIGNIFICANT and low > 0:
        found = "better than dense, the interval excludes 0"
    return f"How sure: {found} ({counts}, p = {p_value:.2g}).{chosen}{few}"


def _marked(row: ResultRow) -> str:
    return f"{row.name} {marks(row.metrics.over_budget, row.meets_budget, row.metrics.samples)}".rstrip()


def _bytes(row: ResultRow) -> str:
    """What a row reads: of the whole model, beside the layers where it is sparse."""
    found = row.metrics
    if found.model_kv_fraction is None or found.layers is None:
        return f"{percent(found.kv_fraction)} of the dense KV bytes in its sparse layers"
    sparse = f" ({percent(found.kv_fraction)} in its {found.sparse_layers} sparse layers of {found.layers})"
    return f"{percent(found.model_kv_fraction)} of the model's dense KV bytes{sparse * (found.sparse_layers != found.layers)}"


def _short_bytes(row: ResultRow) -> str:
    found = row.metrics
    partly = found.layers is not None and found.sparse_layers != found.layers and not row.is_dense
    share = percent(found.kv_fraction if found.model_kv_fraction is None else found.model_kv_fraction)
    return f"{share} (sparse layers {found.sparse_layers} of {found.layers})" if partly else share


def _samples(row: ResultRow) -> str:
    counts = row.metrics.samples
    thinking = counts.never_left_thinking
    return f"{counts.ok} of {counts.total}" + f" ({thinking} never left thinking)" * bool(thinking)


def _loading(row: ResultRow) -> str:
    """The two lines of Python that run a model under a result's configuration."""
    file = str(row.folder / "config.json")
    return f"attention = ResearchAttention.from_file({file!r}, lm)\nwith sparse_attention(lm, attention):  # lm.model.generate(...)"


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
    undefined=StrictUndefined,  # a missing value is an error, not an empty text
    trim_blocks=True,
    lstrip_blocks=True,
)
_PAGES.filters |= {
    "bytes": _bytes,
    "short_bytes": _short_bytes,
    "breakable": _breakable,
    "confidence": _confidence,
    "difference": difference,
    "interval": interval,
    "json": lambda record: record.model_dump_json(),
    "loading": _loading,
    "marked": _marked,
    "number": number,
    "percent": percent,
    "samples": _samples,
    "when": _when,
}
