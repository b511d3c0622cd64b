"""Damaged result files: a report leaves them out and names file and field in one line; it never ends in a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from benchmark.execution.jobs import BenchmarkUnit
from benchmark.execution.runner import run_benchmarks
from benchmark.report.data import Tree, read_tree
from benchmark.report.page import write_report
from benchmark.settings import Settings
from benchmark.speed.toy import save_tiny_model
from benchmark.storage.benchmark_records import FoundBy
from sparse_attention_hub.errors import UserError
from tests.toy import ToyTask, toy_configs

SPARSE = "sink_local_25pct"
FILES = {"metrics.json": f"tiny/{SPARSE}/toy_count", "config.json": f"tiny/{SPARSE}/toy_count", "benchmark_summary.json": "."}
#: Objects whose values may be any finite JSON.
FREE = ("settings", "params", "hyperparams", "aggregate")
HUGE = "1" + "0" * 400
DEEP = "[" * 100 + "]" * 100
Where = tuple[str | int, ...]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a tiny run: dense and one sparse configuration, with an aggregate, provenance and a failure."""
    base = tmp_path_factory.mktemp("results")
    found = FoundBy(
        config_run="run_x", config_file="toy.json", budget=0.25, meets_budget=True, error=0.1, density=0.2, score=0.5,
        hyperparams={"local.window_size": 16}, identity="x", sparse_from="question",
    )  # fmt: skip
    model = str(save_tiny_model(base / "tiny-llama"))
    settings = Settings(
        (model,), ("toy/count",), device="cpu", max_new_tokens=2, max_requests=3, max_context_length=512,
        benchmark_results_dir=base / "out",
    )  # fmt: skip
    task = ToyTask()
    score = task.score_answer

    def raise_once(prediction: str, references: Any, all_classes: Any = None) -> dict[str, float]:
        if len(failed) < 2:
            failed.append(prediction)
            raise ValueError("a metric that raises")
        return score(prediction, references, all_classes)

    failed: list[str] = []
    task.score_answer = raise_once  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmark.execution.jobs.get_task", lambda name: task)
        unit = BenchmarkUnit(model, task.name, tuple(toy_configs()[:2]), {SPARSE: found})
        run_benchmarks([unit], settings, in_process=True)
    (folder,) = (path for path in (base / "out").iterdir() if path.is_dir() and not path.name.startswith("."))
    folder.rename(base / "out" / "tiny")
    return base / "out"


def fields(value: Any, where: Where = ()) -> Iterator[Where]:
    """Every field of a JSON value; of a list, the first entry."""
    for name, entry in list(value.items() if isinstance(value, dict) else enumerate(value[:1])):
        yield (*where, name)
        if isinstance(entry, dict | list):
            yield from fields(entry, (*where, name))


def damaged_texts(content: Any, damage: str) -> Iterator[tuple[Where, Any, str]]:
    """(field, its value, the file's text with that field damaged) for every field."""
    for where in fields(content):
        copy = json.loads(json.dumps(content))
        holder = copy
        for name in where[:-1]:
            holder = holder[name]
        value = holder[where[-1]]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        wrong = "[7]" if value is None else '"7"' if number else "7"
        new = {"null": "null", "wrong type": wrong, "huge": HUGE, "NaN": "NaN", "deep": DEEP}.get(damage)
        if new is None and isinstance(holder, dict):
            del holder[where[-1]]
        elif new is not None:
            holder[where[-1]] = "@new@"
        else:
            continue
        yield where, value, json.dumps(copy).replace('"@new@"', new or "")


def read(folder: Path, text: str, path: Path) -> Tree:
    before = path.read_bytes()
    path.write_text(text)
    try:
        return read_tree(folder)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("damage", ["missing", "null", "wrong type", "huge", "NaN", "deep"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_field_costs_its_file_only(name: str, damage: str, results: Path) -> None:
    path = results / FILES[name] / name
    assert len(read_tree(results).rows) == 2 and read_tree(results).damaged == []
    accepted = []
    for where, value, text in damaged_texts(json.loads(path.read_text()), damage):
        tree = read(results, text, path)
        lost = len(tree.rows) == 1 if name != "benchmark_summary.json" else tree.summary is None and len(tree.rows) == 2
        if tree.damaged:
            (line,) = tree.damaged
            assert lost and line.startswith(f"{path}: ") and "\n" not in line and len(line) < 800, line
            assert str(where[0]) in line, line
        else:
            assert not lost
            accepted.append((where, value))
    free = [where for where, _ in accepted if any(name in where[:-1] for name in FREE)]
    others = [(where, value) for where, value in accepted if where not in free]
    if damage in ("wrong type", "NaN", "deep"):
        assert others == []
    if damage == "NaN":
        assert free == []
    if damage == "huge":
        assert all(isinstance(value, int) for _, value in others), "a number without a bound, such as a seed"


def test_a_result_says_what_the_whole_model_reads(results: Path) -> None:
    for row in read_tree(results).rows:
        assert row.metrics.layers == row.metrics.sparse_layers == 2
        assert row.metrics.model_kv_fraction == row.metrics.kv_fraction is not None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0", '{"a": ' + "[" * 100000, "[" * 100000 + "]" * 100000, "\ud83d"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_holds_no_record_is_left_out(name: str, text: str, results: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(results, tmp_path / "copy")
    path = folder / FILES[name] / name
    path.write_bytes(text.encode(errors="surrogatepass"))
    (line,) = read_tree(folder).damaged
    assert line.startswith(f"{path}: ") and "\n" not in line


@pytest.mark.parametrize("name", ["metrics.json", "config.json", "raw_results.csv"])
def test_without_any_readable_result_there_is_no_report(name: str, results: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(results, tmp_path / "copy")
    for path in folder.rglob(name):
        path.unlink() if name != "metrics.json" else path.write_text("{}")
    with pytest.raises(UserError, match=name) as told:
        read_tree(folder)
    assert "\n" not in str(told.value)


def test_the_sample_run_and_moved_results_are_no_rows(results: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(results, tmp_path / "copy")
    shutil.copytree(results, folder / "sample")
    moved = folder / "tiny" / SPARSE / "toy_count.0123abcd"
    shutil.copytree(folder / "tiny" / SPARSE / "toy_count", moved)
    (moved / "config.json").write_text("{}")
    tree = read_tree(folder)
    assert len(tree.rows) == 2 and tree.damaged == []


@pytest.mark.parametrize("value", ["nan", "x", "inf", "9" * 5000, "\x1b[31m"])
def test_a_score_that_is_no_number_costs_its_result_only(value: str, results: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(results, tmp_path / "copy")
    (row,) = (row for row in read_tree(folder).rows if row.name == SPARSE)
    path = row.folder / "raw_results.csv"
    lines = path.read_text()
    score = next(iter(row.scores.values()))
    path.write_text(lines.replace(f'"{score}"', f'"{value}"'))
    tree = read_tree(folder)
    (line,) = tree.damaged
    assert [row.name for row in tree.rows] == ["dense"]
    assert line.startswith(f"{path}: ") and "must be a number" in line and line.isprintable() and len(line) < 800
    page = unescape(write_report(folder).read_text())
    assert line in page and "dense" in page


@pytest.mark.parametrize("text", ["", "\0", "status", '"a', "a,b\n1,2,3\n", "\ud83d"])
def test_a_table_that_is_none_costs_its_result_only(text: str, results: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(results, tmp_path / "copy")
    path = folder / "tiny" / SPARSE / "toy_count" / "raw_results.csv"
    path.write_bytes(text.encode(errors="surrogatepass"))
    tree = read_tree(folder)
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in tree.damaged)
    assert len(tree.rows) + len(tree.damaged) == 2 and not any(row.scores for row in tree.rows if row.name == SPARSE)
    write_report(folder)
