"""The report: which configuration it recommends, how certain it says that is, and the page in a real browser."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmark.report.__main__ import main
from benchmark.report.data import choose, compare_trees, group_means, read_tree, run_again
from benchmark.report.page import write_comparison, write_report
from benchmark.report.table import closing_table
from benchmark.stats import compare_paired, mean, mean_interval
from benchmark.storage.benchmark_records import ResultRow, SampleCounts, Summary
from benchmark.storage.results import safe_name, write_json

MODEL = "org/model-1B"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


def write_row(base: Path, task: str, name: str, scores: list[float], dense: list[float] | None, **changes: Any) -> Path:
    """A result folder as Phase 2 writes it. changes: density, kv_fraction, nll, budget, samples_hash, failures, sparse_from,
    engine, maskers (their types), metrics (its fields), settings."""
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
        "interval": mean_interval(scores),
        "reference_nll": changes.get("nll", 0.5),
        "density": density,
        "error": 0.0 if dense is None else 0.1,
        "kv_fraction": changes.get("kv_fraction", density),
        "budget": changes.get("budget"),
        "over_budget": False,
        "scores": {},
        "perplexity": None,
        "samples": {
            "total": len(scores) + len(failures),
            "ok": len(scores),
            "failed": len(failures),
            "timed_out": 0,
            "unscored": 0,
            "missing": 0,
            "capped": 0,
            "truncated": 0,
            "without_reference_nll": 0,
        },
        "seconds": 1.5,
        "failures": failures,
        "difference_to_dense": paired.model_dump() if paired else None,
        **changes.get("metrics", {}),
    }
    write_json(folder / "metrics.json", metrics)
    maskers = [{"type": kind, "params": {}} for kind in changes.get("maskers", [])]
    sparse = None if dense is None else {"type": "ResearchAttentionConfig", "masker_configs": maskers}
    config = {
        "model": MODEL,
        "task": task,
        "configuration": name,
        "sparse_config": sparse,
        "masker_classes": None,
        "budget": changes.get("budget"),
        "hash": "h",
        "samples": [],
        "settings": changes.get("settings", {}),
        "samples_hash": changes.get("samples_hash", "s"),
        "sparse_from": changes.get("sparse_from", "question"),
        "seed": 3,
        "dtype": "float32",
        "device": "cpu",
        "dense_backend": "sdpa",
        "attention_backend": "auto",
        "micro_metrics": "sample",
        "max_new_tokens": 32,
        "max_context_length": 1024,
        "max_requests": None,
        "config_run": "run_20240315_143022",
        "provenance": None,
        "versions": {"engine": changes.get("engine", "1")},
    }
    write_json(folder / "config.json", config)
    with (folder / "raw_results.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
        writer.writerow(["context", "predicted_answer", "accuracy", "status"])
        writer.writerows(["two\nlines", "x", score, "ok"] for score in scores)
        writer.writerows(["two\nlines", "", "", "failed"] for _ in failures)
    return folder


def enumerate_ids(scores: list[float]) -> list[tuple[str, float]]:
    return [(str(index), score) for index, score in enumerate(scores)]


def words(path: Path) -> str:
    """The text of a page, in one line."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", "", path.read_text().replace("</td>", " "))))


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


def test_the_best_that_saves_reads_is_chosen_and_the_oracle_is_the_ceiling(results: Path) -> None:
    group = read_tree(results).groups[0]
    found = choose(group, 0.1)
    assert found is not None and found.best is not None and found.ceiling is not None
    assert found.best.row.name == "random_10pct" and found.best.candidates == 2
    assert found.runner_up is not None and found.runner_up.name == "sink_local_10pct"
    assert found.margin is not None and found.margin.difference == pytest.approx(2 / 3) and found.margin.n == 30
    assert found.ceiling.row.name == "oracle_10pct" and found.ceiling.candidates == 3  # it reads most keys to select few
    assert choose(group, 0.01) is None


def test_budgets_on_kv_bytes_stand_apart_and_go_by_the_bytes(tmp_path: Path) -> None:
    write_row(tmp_path, "t/a", "dense", [1.0] * 4, None)
    write_row(tmp_path, "t/a", "a_10pct", [1.0] * 4, [1.0] * 4, density=0.1, budget=0.1)
    kv = {"budget": 0.1, "metrics": {"budget_on": "kv"}}
    write_row(tmp_path, "t/a", "b_10pct", [1.0] * 4, [1.0] * 4, density=0.02, kv_fraction=0.09, **kv)
    write_row(tmp_path, "t/a", "c_10pct", [1.0] * 4, [1.0] * 4, density=0.01, kv_fraction=0.2, **kv)
    tree = read_tree(tmp_path)
    assert [(group.budget_on, [row.name for row in group.rows]) for group in tree.groups] == [
        ("density", ["dense", "a_10pct"]),
        ("kv", ["dense", "b_10pct", "c_10pct"]),
    ]
    assert len(tree.rows) == 4
    found = choose(tree.groups[1], 0.1)
    assert found is not None and found.best is not None and found.best.row.name == "b_10pct" and found.runner_up is None
    page = words(write_report(tmp_path))
    assert "at 10% of the KV bytes" in page and "at 10% density" in page and "t/a, budgets on KV bytes" in page
    assert "at KV bytes 9.0%" in page and "--budget-on kv" in run_again([found.best.row])


def test_even_and_fitted_head_budgets_have_a_chart(tmp_path: Path) -> None:
    folder = write_row(tmp_path, "t/a", "a_2pct", [1.0], [1.0], density=0.02, budget=0.02)
    assert "Even and fitted head budgets" not in words(write_report(tmp_path))
    record = json.loads((folder / "config.json").read_text())
    even = {"trial_id": "x_00001", "error": 0.3, "density": 0.02, "kv_fraction": None, "score": None}
    found = {"config_run": "run_20240315_143022", "config_file": "f", "budget": 0.02, "meets_budget": True, "error": 0.2}
    found |= {
        "density": 0.02,
        "score": None,
        "hyperparams": {},
        "identity": "i",
        "sparse_from": "question",
        "even_budgets": even,
    }
    write_json(folder / "config.json", record | {"provenance": found})
    page = write_report(tmp_path)
    assert "Even and fitted head budgets" in words(page) and "even against fitted head budgets, t/a" in page.read_text()
    assert "--levels 2 " in run_again([read_tree(tmp_path).rows[0]])


def test_an_oracle_is_never_what_to_use(tmp_path: Path) -> None:
    changes = {"density": 0.5, "budget": 0.5, "kv_fraction": 0.7, "maskers": ["OracleTopKConfig"]}
    write_row(tmp_path, "t/a", "a_50pct", [1.0], [1.0], **changes)
    found = choose(read_tree(tmp_path).groups[0], 0.5)
    assert found is not None and found.best is None and found.ceiling is not None
    page = words(write_report(tmp_path))
    assert "No configuration within this budget saves reads." in page and "Ceiling: a_50pct" in page


def test_intervals_of_a_choice_hold_for_all_candidates(tmp_path: Path) -> None:
    """The true scores of 40 equal configurations are .5: the best one's own interval excludes that far too often."""
    write_row(tmp_path, "t/a", "a_10pct", [1.0] * 40, [1.0] * 40, density=0.1, budget=0.1)
    (group,) = read_tree(tmp_path).groups
    (row,) = group.rows
    generator = np.random.default_rng(0)
    spoiled = simultaneous = 0
    for _ in range(30):
        samples = generator.integers(0, 2, (40, 40)).astype(float).tolist()
        group.rows = [
            replace(row, scores=dict(enumerate_ids(scores)), metrics=row.metrics.model_copy(update={"score": mean(scores)}))
            for scores in samples
        ]
        found = choose(group, 0.1)
        assert found is not None and found.best is not None and found.best.candidates == 40
        together, alone = found.best.interval, mean_interval(list(found.best.row.scores.values()))
        assert together is not None and together[0] < alone[0]
        spoiled += alone[0] > 0.5
        simultaneous += together[0] > 0.5
    assert spoiled > 10 and simultaneous <= 1


def test_a_cost_is_real_only_for_all_candidates_at_once(tmp_path: Path) -> None:
    dense = [1.0] * 12
    write_row(tmp_path, "t/a", "dense", dense, None)
    write_row(tmp_path, "t/a", "a0_10pct", [0.0] * 7 + [1.0] * 5, dense, density=0.1, budget=0.1)
    assert "the cost is real" in words(write_report(tmp_path))
    for index in range(1, 20):
        write_row(tmp_path, "t/a", f"a{index}_10pct", [0.0] * 8 + [1.0] * 4, dense, density=0.1, budget=0.1)
    page = words(write_report(tmp_path))
    assert "the cost is real" not in page and "no difference is shown (0 better, 7 worse, 5 equal of 12 samples" in page
    assert "Chosen among 20 by these samples: the intervals hold for all 20 at once" in page
    assert "Intervals and p-values are each row's own" in page


@pytest.mark.parametrize(("right", "n", "fails"), [(0, 9, True), (1, 9, True), (2, 9, False), (0, 1, True), (1, 1, False)])
def test_where_dense_fails_nothing_is_concluded(right: int, n: int, fails: bool, tmp_path: Path) -> None:
    dense = [1.0] * right + [0.0] * (n - right)
    write_row(tmp_path, "t/a", "dense", dense, None)
    write_row(tmp_path, "t/a", "a_10pct", dense, dense, density=0.1, budget=0.1)
    page = words(write_report(tmp_path))
    assert ("Dense fails here: no conclusion." in page) == fails
    assert (f"scores above 0 on {right} of {n} samples" in page) == fails
    assert ("at 10% density" in page) != fails


def test_what_scores_nothing_is_not_what_to_use(tmp_path: Path) -> None:
    write_row(tmp_path, "t/a", "dense", [1.0] * 9, None)
    write_row(tmp_path, "t/a", "a_10pct", [0.0] * 9, [1.0] * 9, density=0.1, budget=0.1)
    assert "Nothing: no configuration that saves reads scores above 0. First by reference NLL: a_10pct" in words(
        write_report(tmp_path)
    )


@pytest.mark.parametrize("score", [0.0, 0.5])
def test_the_closing_table_says_where_dense_fails(score: float) -> None:
    counts = SampleCounts.model_construct(total=9, ok=9, failed=0, missing=0)
    rows = [
        ResultRow.model_construct(
            model="m",
            task="t",
            configuration=name,
            metric="f1",
            score=score,
            interval=None,
            density=1.0,
            error=0.0,
            samples=counts,
            difference_to_dense=None,
            over_budget=None,
            meets_budget=None,
        )  # fmt: skip
        for name in ("dense", "a_10pct")
    ]
    table = closing_table(Summary.model_construct(results=rows))
    assert ("dense fails here: no conclusion" in table) == (score == 0)


def test_scores_of_a_group_are_means_over_its_tasks(tmp_path: Path) -> None:
    for task, dense, sparse in (("vt", [1.0] * 4, [1.0, 1.0, 0.0, 0.0]), ("fwe", [0.5] * 2, [0.5] * 2)):
        write_row(tmp_path, f"ruler/4096/{task}", "dense", dense, None)
        write_row(tmp_path, f"ruler/4096/{task}", "a_10pct", sparse, dense, density=0.1, budget=0.1)
    write_row(tmp_path, "ruler/4096/vt", "b_10pct", [1.0] * 4, [1.0] * 4, density=0.1, budget=0.1)
    write_row(tmp_path, "loogle/longdep_qa", "dense", [1.0], None)
    means = {mean.configuration: mean for mean in group_means(read_tree(tmp_path).groups)}
    assert {mean.group for mean in means.values()} == {"ruler/4096"} and len(means) == 3
    assert means["dense"].score == 0.75 and means["dense"].to_dense is None
    sparse = means["a_10pct"]
    assert sparse.score == 0.5 and sparse.interval is not None and sparse.interval[0] < 0.5 < sparse.interval[1]
    assert sparse.to_dense is not None and sparse.to_dense.difference == -0.25 and sparse.to_dense.interval is not None
    assert means["b_10pct"].score is None and means["b_10pct"].missing == ["ruler/4096/fwe"]
    page = words(write_report(tmp_path))
    assert "ruler/4096 dense 2 of 13 0.750" in page and "ruler/4096 b_10pct 1 of 13 - - -" in page


def test_bytes_are_those_of_the_whole_model(tmp_path: Path) -> None:
    layers = {"model_kv_fraction": 0.35, "layers": 4, "sparse_layers": 1}
    write_row(tmp_path, "t/a", "a_10pct", [1.0], [1.0], density=0.1, budget=0.1, metrics=layers)
    page = words(write_report(tmp_path))
    assert "reads 35.0% of the model's dense KV bytes (10.0% in its 1 sparse layers of 4)" in page
    assert "35.0% (sparse layers 1 of 4)" in page and "sparse layers 1 of 4" in page


def test_ties_go_to_the_smaller_nll_and_slack_is_a_tenth(tmp_path: Path) -> None:
    write_row(tmp_path, "t/a", "a_10pct", [1.0, 1.0], [1.0, 1.0], density=0.05, nll=0.4)
    write_row(tmp_path, "t/a", "b_10pct", [1.0, 1.0], [1.0, 1.0], density=0.109, nll=0.3)
    write_row(tmp_path, "t/a", "c_10pct", [1.0, 1.0], [1.0, 1.0], density=0.111, nll=0.1)
    found = choose(read_tree(tmp_path).groups[0], 0.1)
    assert found is not None and found.best is not None and found.best.row.name == "b_10pct"


def test_other_samples_and_protocols_are_not_mixed(results: Path) -> None:
    write_row(results, "ruler/4096/vt", "other_10pct", [1.0] * 9, [1.0] * 9, density=0.02, samples_hash="t")
    write_row(results, "ruler/4096/vt", "decode_10pct", [1.0] * 30, [1.0] * 30, density=0.02, sparse_from="decode")
    write_row(results, "ruler/4096/vt", "older_10pct", [1.0] * 30, [1.0] * 30, density=0.02, engine="0")
    retrained = {"weights": [["model.safetensors", 1, 2]]}
    write_row(results, "ruler/4096/vt", "before_10pct", [1.0] * 30, [1.0] * 30, density=0.02, settings=retrained)
    write_row(results, "ruler/4096/vt", "half_10pct", [1.0] * 30, [1.0] * 30, density=0.02, settings={"dtype": "bfloat16"})
    groups = read_tree(results).groups
    assert [group.sparse_from for group in groups] == ["decode", "question"]
    told = {row.name: groups[1].what_differs(row) for row in groups[1].others}
    assert told == {
        "other_10pct": "other samples", "older_10pct": "engine version 0", "before_10pct": "other weights",
        "half_10pct": "dtype bfloat16",
    }  # fmt: skip
    found = choose(groups[1], 0.1)
    assert found is not None and found.best is not None and found.best.row.name == "random_10pct"


def test_what_failed_on_most_samples_is_not_what_to_use(tmp_path: Path) -> None:
    failures = [{"sample_id": str(i), "status": "failed", "problem": "out of memory"} for i in range(45)]
    write_row(tmp_path, "t/a", "dense", [0.6] * 50, None)
    write_row(tmp_path, "t/a", "bad_10pct", [1.0] * 5, [0.6] * 50, density=0.05, budget=0.1, failures=failures)
    write_row(tmp_path, "t/a", "good_10pct", [0.6] * 48, [0.6] * 50, density=0.05, budget=0.1, failures=failures[:2])
    found = choose(read_tree(tmp_path).groups[0], 0.1)
    assert found is not None and found.best is not None and found.best.row.name == "good_10pct" and found.best.candidates == 1


def test_a_p_value_that_is_0_is_not_none(tmp_path: Path) -> None:
    many = 1200
    write_row(tmp_path / "a", "t/a", "dense", [1.0] * many, None)
    write_row(tmp_path / "a", "t/a", "x_10pct", [0.1] * many, [1.0] * many, density=0.05, budget=0.1)
    assert "the cost is real, its interval excludes 0 (0 better, 1200 worse, 0 equal of 1200 samples, p = 0)" in words(
        write_report(tmp_path / "a")
    )
    write_row(tmp_path / "b", "t/a", "x_10pct", [0.9] * many, [1.0] * many, density=0.05, budget=0.1)
    page = words(write_comparison(tmp_path / "a", tmp_path / "b"))
    assert "in 1 of them the interval of the difference excludes 0" in page


def test_without_dense_nothing_is_compared_with_it(tmp_path: Path) -> None:
    write_row(tmp_path, "t/a", "x_10pct", [0.5] * 40, [0.5] * 40, density=0.05, budget=0.1)
    page = words(write_report(tmp_path))
    assert "How sure: not compared with dense attention" in page and "too few" not in page


def test_the_page_names_the_choice_and_its_certainty(results: Path) -> None:
    path = write_report(results)
    assert path == results / "report.html"
    page = words(path)
    assert "at 10% density" in page
    assert "the cost is real, its interval excludes 0 (0 better, 10 worse, 20 equal of 30 samples, p = 0.0039)" in page
    assert "every sample scored as under dense attention (0 better, 0 worse, 29 equal of 29 samples); up to 13%" in page
    assert "Ceiling: oracle_10pct, score 1.000" in page and "it shows what quality is in reach, not what to run" in page
    assert "<b>ValueError</b>" in page, "text is escaped"
    assert "--phase 2 --config-run run_20240315_143022 --models org/model-1B" in page


def test_a_card_ends_with_the_two_lines_that_load_the_result(results: Path) -> None:
    """Only where something is to be used: not on a card of a ceiling alone, nor where all scores are 0."""
    cards = write_report(results).read_text().split('<div class="card">')
    loads = [unescape(card) for card in cards if "from_file" in card]
    assert len(loads) == 2  # 10% and 25%
    file = results / "org_model-1B" / "random_10pct" / "ruler_4096_vt" / "config.json"
    first, second = re.findall(r"<pre>(attention = .*?)</pre>", loads[0], flags=re.DOTALL)[0].splitlines()
    assert first == f"attention = ResearchAttention.from_file({str(file)!r}, lm)" and file.is_file()
    assert second.startswith("with sparse_attention(lm, attention):")
    write_row(results, "t/a", "dense", [1.0] * 9, None)
    write_row(results, "t/a", "a_10pct", [0.0] * 9, [1.0] * 9, density=0.1, budget=0.1)
    assert write_report(results).read_text().count("from_file") == 2


def test_answers_that_never_left_their_thinking_are_counted(results: Path) -> None:
    counts = {"total": 3, "ok": 3, "failed": 0, "timed_out": 0, "unscored": 0, "missing": 0, "capped": 0, "truncated": 0}
    counts |= {"without_reference_nll": 0, "never_left_thinking": 2}
    write_row(results, "t/a", "a_10pct", [0.0] * 3, [1.0] * 3, density=0.1, budget=0.1, metrics={"samples": counts})
    page = words(write_report(results))
    assert "3 of 3 (2 never left thinking)" in page and page.count("never left thinking)") == 1
    row = ResultRow.model_construct(**json.loads((results / safe_name(MODEL) / "a_10pct" / "t_a" / "metrics.json").read_text()))
    row.samples, row.difference_to_dense, row.meets_budget = SampleCounts(**counts), None, None
    assert " answers that never left their thinking: a_10pct 2" in closing_table(Summary.model_construct(results=[row]))


def test_the_page_loads_nothing(results: Path) -> None:
    page = write_report(results).read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|@import|url\(", page)


def test_charts_are_reproducible_and_follow_the_colours_of_the_page(results: Path) -> None:
    write_row(results, "ruler/4096/vt", "a_\"'<i>&$x$_10pct", [1.0] * 30, [1.0] * 30, density=0.08, budget=0.1)
    page = write_report(results).read_text()
    assert write_report(results).read_text() == page
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert {"var(--c0)", "var(--c1)", "var(--c2)", "var(--dense)", "var(--line)"} <= set(re.findall(r"var\(.*?\)", drawn))
    assert not re.search(r"#[0-9a-f]{6}\b", drawn), "every colour is one of the page's"
    assert not re.search(r" id=(?!.m[0-9a-f]{10})", drawn), "only markers have an id: equal ids are equal markers"
    tooltips = [unescape(title) for title in re.findall(r"<title>(.*?)</title>", drawn)]
    assert "random_10pct: score 0.667 [0.472, 0.827] at density 10.0%" in tooltips
    assert any("\"'<i>&$x$" in tooltip for tooltip in tooltips) and "<i>" not in page


def test_the_command_to_run_again_is_valid(results: Path) -> None:
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
    pairs = {pair.key[3]: pair for pair in compare_trees(read_tree(results), read_tree(other))}
    found = pairs["random_10pct"].comparison
    assert found is not None and found.difference == pytest.approx(5 / 30) and found.better == 5 and found.worse == 0
    assert pairs["oracle_10pct"].b is None
    page = write_comparison(results, other, tmp_path / "page.html").read_text()
    assert "only in A" in page and "+0.167" in page


@pytest.mark.parametrize("damage", ["absent", "empty"])
def test_bad_folders_give_one_line_and_code_2(damage: str, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if damage == "absent":
        results = results / "nowhere"
    else:
        results = results.parent / "empty"
        results.mkdir()
    assert main([str(results)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1


@pytest.mark.parametrize(("name", "text"), [("metrics.json", '{"model": '), ("config.json", "{}"), ("raw_results.csv", None)])
def test_a_damaged_result_is_left_out_and_named(name: str, text: str | None, results: Path) -> None:
    path = results / "org_model-1B" / "oracle_10pct" / "ruler_4096_vt" / name
    path.unlink() if text is None else path.write_text(text)
    page = unescape(write_report(results).read_text())
    assert f"{path}: " in page and "4 results" in page


def test_the_default_is_the_own_folder_else_the_sample(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(results.parent)
    assert main([]) == 0 and "sample" not in capsys.readouterr().out and (results / "report.html").exists()
    (results / "org_model-1B").rename(results.parent / "moved")
    assert main([]) == 2 and "holds no results" in capsys.readouterr().err
    (results / "sample").mkdir()
    (results.parent / "moved").rename(results / "sample" / "org_model-1B")
    assert main([]) == 0 and "this is the sample run" in capsys.readouterr().out
    assert (results / "sample" / "report.html").exists()


def test_help_is_quick() -> None:
    code = "import sys; from benchmark.report.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'numpy', 'matplotlib', 'jinja2', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


PROBE = """
<script>
const found = {violations: [], errors: window.__errors || []};
document.addEventListener("securitypolicyviolation", (event) => found.violations.push(event.blockedURI));
window.addEventListener("error", (event) => found.errors.push(event.message));
const column = (name) => {
  const table = document.querySelector("table.sortable");
  const index = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === name);
  const read = () => [...table.tBodies[0].rows].map((row) => row.cells[index].textContent);
  return {button: table.tHead.rows[0].cells[index].querySelector("button"), read};
};
const score = column("Score"), difference = column("To dense");
score.button.click(); found.up = score.read();
score.button.click(); found.down = score.read();
found.aria = document.querySelector("th[aria-sort]").getAttribute("aria-sort");
difference.button.click(); found.missing = difference.read();
found.tooltips = new Set([...document.querySelectorAll("svg title")].map((title) => title.textContent)).size;
found.wide = document.documentElement.scrollWidth > window.innerWidth;
window.addEventListener("load", () => setTimeout(() => {
  found.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  const out = Object.assign(document.createElement("pre"), {id: "probe", textContent: JSON.stringify(found)});
  document.body.append(out);
}, 50));
</script></body>"""


def in_browser(path: Path, tmp_path: Path, width: int = 1200) -> tuple[str, str]:
    """(the document after its scripts ran, the messages of the browser's console)."""
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
def test_tables_sort_and_nothing_is_requested_in_a_browser(results: Path, tmp_path: Path, width: int) -> None:
    page = write_report(results).read_text()
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</body>", PROBE))
    document, console = in_browser(probed, tmp_path, width)
    output = re.search(r'<pre id="probe">(.*?)</pre>', document, flags=re.DOTALL)
    assert output, document[-500:]
    found = json.loads(unescape(output.group(1)))
    assert found["up"] == ["0.000", "0.667", "1.000", "1.000", "1.000"]
    assert found["down"] == ["1.000", "1.000", "1.000", "0.667", "0.000"]
    assert found["aria"] == "descending"
    assert found["missing"][-1] == "-", "missing values stay last"
    assert found["tooltips"] == 4, "one per sparse configuration"
    assert not found["wide"], "only tables scroll sideways"
    assert found["requests"] == found["violations"] == found["errors"] == []
    assert console == ""
