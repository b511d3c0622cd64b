"""The report: which configuration it names, what it says of sureness, and the page in a real browser."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from benchmark.report.__main__ import main, write_comparison, write_report
from benchmark.report.data import choose, compare_trees, read_tree, run_again
from benchmark.stats import bootstrap_interval, compare_paired, mean
from benchmark.storage.results import safe_name, write_json

MODEL = "org/model-1B"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


def write_row(base: Path, task: str, name: str, scores: list[float], dense: list[float] | None, **changes: Any) -> Path:
    """A result folder as Phase 2 writes it. changes: density, kv_fraction, nll, budget, samples_hash, failures, sparse_from."""
    folder = base / safe_name(MODEL) / name / safe_name(task)
    folder.mkdir(parents=True)
    density = changes.get("density", 1.0)
    paired = compare_paired(dict(enumerate_ids(scores)), dict(enumerate_ids(dense))) if dense is not None else None
    failures = changes.get("failures", [])
    metrics = {
        "model": MODEL,
        "task": task,
        "configuration": name,
        "metric": "accuracy",
        "score": mean(scores),
        "interval": bootstrap_interval(scores),
        "reference_nll": changes.get("nll", 0.5),
        "density": density,
        "error": 0.0 if dense is None else 0.1,
        "kv_fraction": changes.get("kv_fraction", density),
        "budget": changes.get("budget"),
        "over_budget": False,
        "samples": {"total": len(scores) + len(failures), "ok": len(scores), "failed": len(failures), "missing": 0},
        "seconds": 1.5,
        "failures": failures,
        "difference_to_dense": paired.to_dict() if paired else None,
    }
    write_json(folder / "metrics.json", metrics)
    sparse = None if dense is None else {"type": "ResearchAttentionConfig", "masker_configs": []}
    config = {
        "model": MODEL,
        "task": task,
        "configuration": name,
        "sparse_config": sparse,
        "samples_hash": changes.get("samples_hash", "s"),
        "sparse_from": changes.get("sparse_from", "question"),
        "seed": 3,
        "dtype": "float32",
        "device": "cpu",
        "max_new_tokens": 32,
        "max_context_length": 1024,
        "max_requests": None,
        "config_run": "run_20240315_143022",
        "provenance": {"meets_budget": True},
        "versions": {"torch": "2", "commit": "abc"},
    }
    write_json(folder / "config.json", config)
    with (folder / "raw_results.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
        writer.writerow(["context", "predicted_answer", "accuracy", "status"])
        writer.writerows(["two\nlines", "x", score, "ok"] for score in scores)
        writer.writerows(["two\nlines", "", "", "failed"] for _ in failures)
    return folder


def enumerate_ids(scores: list[float]) -> list[tuple[str, float]]:
    return [(str(place), score) for place, score in enumerate(scores)]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """At 10%: an oracle that keeps all answers, a sampler that loses a third, a window that loses all."""
    base = tmp_path / "benchmark_results"
    dense = [1.0] * 30
    write_row(base, "ruler/4096/vt", "dense", dense, None)
    write_row(base, "ruler/4096/vt", "sink_local_10pct", [0.0] * 30, dense, density=0.05, budget=0.1)
    write_row(base, "ruler/4096/vt", "oracle_10pct", dense, dense, density=0.099, budget=0.1, kv_fraction=0.6)
    write_row(base, "ruler/4096/vt", "random_10pct", [1.0] * 20 + [0.0] * 10, dense, density=0.1, budget=0.1)
    failure = {"sample_id": "vt:7", "status": "failed", "problem": "<b>ValueError</b>"}
    write_row(base, "ruler/4096/vt", "random_25pct", [1.0] * 29, dense, density=0.24, budget=0.25, failures=[failure])
    return base


def test_the_best_score_within_the_budget_is_named(results: Path) -> None:
    group = read_tree(results).groups[0]
    found = choose(group, 0.1)
    assert found is not None and found.best.name == "oracle_10pct"
    assert found.runner_up is not None and found.runner_up.name == "random_10pct"
    assert found.margin is not None and found.margin.difference == pytest.approx(1 / 3) and found.margin.n == 30
    assert found.light is not None and found.light.name == "random_10pct"  # the oracle reads most keys to choose
    assert choose(group, 0.01) is None


def test_ties_go_to_the_smaller_nll_and_slack_is_a_tenth(tmp_path: Path) -> None:
    write_row(tmp_path, "t/a", "a_10pct", [1.0, 1.0], [1.0, 1.0], density=0.05, nll=0.4)
    write_row(tmp_path, "t/a", "b_10pct", [1.0, 1.0], [1.0, 1.0], density=0.109, nll=0.3)
    write_row(tmp_path, "t/a", "c_10pct", [1.0, 1.0], [1.0, 1.0], density=0.111, nll=0.1)
    found = choose(read_tree(tmp_path).groups[0], 0.1)
    assert found is not None and found.best.name == "b_10pct"


def test_other_samples_and_protocols_are_not_mixed(results: Path) -> None:
    write_row(results, "ruler/4096/vt", "other_10pct", [1.0] * 9, [1.0] * 9, density=0.02, samples_hash="t")
    write_row(results, "ruler/4096/vt", "decode_10pct", [1.0] * 30, [1.0] * 30, density=0.02, sparse_from="decode")
    groups = read_tree(results).groups
    assert [group.sparse_from for group in groups] == ["decode", "question"]
    assert [row.name for row in groups[1].strangers] == ["other_10pct"]
    best = choose(groups[1], 0.1)
    assert best is not None and best.best.name == "oracle_10pct"


def test_the_page_answers(results: Path) -> None:
    path = write_report(results)
    assert path == results / "report.html"
    page = unescape(re.sub(r"<[^>]+>", "", path.read_text()))
    assert "at 10% density" in page
    assert "no sample scored otherwise than dense (0 better, 0 worse, 30 alike of 30 samples); up to 10%" in page
    assert "Best that reads at most 20% of the bytes: random_10pct, score 0.667" in page
    assert "the cost is real, its interval excludes 0" not in page  # nothing that is chosen costs so much
    assert "<b>ValueError</b>" in page, "text is escaped"
    assert "--phase 2 --config-run run_20240315_143022 --models org/model-1B" in page


def test_nothing_is_loaded_from_anywhere(results: Path) -> None:
    page = write_report(results).read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|@import|url\(", page)


def test_the_command_is_one_that_runs(results: Path) -> None:
    from benchmark.raytune.run_full_benchmark import parse_arguments

    words = shlex.split(run_again(read_tree(results).groups[0].rows))
    assert words[:2] == ["python", "benchmark/raytune/run_full_benchmark.py"]
    options = parse_arguments(words[2:])
    assert (options.phase, options.seed, options.max_requests) == (2, 3, None)
    assert options.configs[0] == "dense" and options.tasks == ["ruler/4096/vt"]


def test_two_trees_are_compared_in_pairs(results: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_row(other, "ruler/4096/vt", "dense", [1.0] * 30, None)
    write_row(other, "ruler/4096/vt", "random_10pct", [1.0] * 25 + [0.0] * 5, [1.0] * 30, density=0.1, budget=0.1)
    rows = {row["key"][3]: row for row in compare_trees(read_tree(results), read_tree(other))}
    found = rows["random_10pct"]["comparison"]
    assert found.difference == pytest.approx(5 / 30) and found.better == 5 and found.worse == 0
    assert rows["oracle_10pct"]["b"] is None
    page = write_comparison(results, other, tmp_path / "page.html").read_text()
    assert "only in A" in page and "+0.167" in page


@pytest.mark.parametrize("damage", ["absent", "empty", "torn", "foreign", "csv"])
def test_bad_trees_are_one_line_and_code_2(damage: str, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = results / "org_model-1B" / "oracle_10pct" / "ruler_4096_vt"
    if damage == "absent":
        results = results / "nowhere"
    elif damage == "empty":
        results = results.parent / "empty"
        results.mkdir()
    elif damage == "torn":
        (folder / "metrics.json").write_text('{"model": ')
    elif damage == "foreign":
        (folder / "config.json").write_text(json.dumps({"model": "x"}))
    else:
        (folder / "raw_results.csv").unlink()
    assert main([str(results)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_help_is_quick() -> None:
    code = "import sys; from benchmark.report.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'numpy', 'matplotlib', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


PROBE = """
<script>
const told = {violations: [], errors: window.__errors || []};
document.addEventListener("securitypolicyviolation", (event) => told.violations.push(event.blockedURI));
window.addEventListener("error", (event) => told.errors.push(event.message));
const column = (name) => {
  const table = document.querySelector("table.sortable");
  const place = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === name);
  return {button: table.tHead.rows[0].cells[place].querySelector("button"), read: () => [...table.tBodies[0].rows].map((row) => row.cells[place].textContent)};
};
const score = column("Score"), difference = column("To dense");
score.button.click(); told.up = score.read();
score.button.click(); told.down = score.read();
told.aria = document.querySelector("th[aria-sort]").getAttribute("aria-sort");
difference.button.click(); told.missing = difference.read();
told.charts = document.querySelectorAll("svg .whisker").length;
told.wide = document.documentElement.scrollWidth > window.innerWidth;
window.addEventListener("load", () => setTimeout(() => {
  told.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  const out = document.createElement("pre"); out.id = "probe"; out.textContent = JSON.stringify(told); document.body.append(out);
}, 50));
</script></body>"""


def in_browser(path: Path, tmp_path: Path, width: int = 1200) -> tuple[str, str]:
    """(the page's document after its scripts ran, what the browser's console said)."""
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=2000"]
    profile = tmp_path / f"profile-{width}"
    command = [CHROMIUM, *flags, f"--user-data-dir={profile}", f"--window-size={width},900", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@needs_browser
@pytest.mark.parametrize("width", [1200, 500])
def test_it_sorts_and_asks_for_nothing_in_a_browser(results: Path, tmp_path: Path, width: int) -> None:
    page = write_report(results).read_text()
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</body>", PROBE))
    document, console = in_browser(probed, tmp_path, width)
    found = re.search(r'<pre id="probe">(.*?)</pre>', document, flags=re.DOTALL)
    assert found, document[-500:]
    told = json.loads(unescape(found.group(1)))
    assert told["up"] == ["0.000", "0.667", "1.000", "1.000", "1.000"]
    assert told["down"] == ["1.000", "1.000", "1.000", "0.667", "0.000"]
    assert told["aria"] == "descending"
    assert told["missing"][-1] == "-", "what has no value stays last"
    assert told["charts"] == 4
    assert not told["wide"], "only tables scroll sideways"
    assert told["requests"] == told["violations"] == told["errors"] == []
    assert console == ""
