"""What is on disk: whole files, journals that survive a kill, and text that comes back as it was."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmark.execution.jobs import AnswerStore, config_key, make_batches
from benchmark.execution.messages import Request
from benchmark.execution.prompts import make_prompt
from benchmark.execution.runner import BenchmarkUnit, run_benchmarks
from benchmark.report.table import closing_table
from benchmark.settings import Settings
from benchmark.storage.benchmark_records import Difference
from benchmark.storage.results import Journal, fingerprint, safe_name, write_json, write_text
from benchmark.storage.tables import read_table, table_text
from benchmark.tasks.base import Sample, answer_seed
from sparse_attention_hub.models import load_tokenizer
from tests.toy import ToyTask, toy_configs

Make = Callable[..., Settings]


def test_names_become_one_folder() -> None:
    assert safe_name("meta-llama/Llama-3.1-8B") == "meta-llama_Llama-3.1-8B"
    assert safe_name("..") == "__" and safe_name("v1..2") == "v1..2"
    assert safe_name('a\\b:c*d?e"f<g>h|i') == "a_b_c_d_e_f_g_h_i"


def test_files_appear_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_json_holds_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": math.nan})
    assert not (tmp_path / "x.json").exists()


def test_a_torn_line_is_dropped_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).append({"n": 1})
    with path.open("ab") as stream:
        stream.write(b'{"n": 2, "half')
    assert Journal(path).read() == [{"n": 1}]
    Journal(path).append({"n": 3})
    assert Journal(path).read() == [{"n": 1}, {"n": 3}]
    assert path.read_bytes().count(b"\n") == 2


def test_the_store_reads_what_is_new_and_keeps_answers_over_failures(tmp_path: Path) -> None:
    def record(status: str, text: str) -> dict[str, Any]:
        answer = {"status": status, "predicted_answer": text, "micro": [[0, 0, 0.1, 0.2, 0.1, 5.0]]}
        return {"kind": "sample", "sample_id": "s", "sample_hash": "h", "limit": 1, "answers": {"dense": answer}}

    store, journal = AnswerStore(tmp_path), Journal(tmp_path / "a.jsonl")
    store.poll()
    assert store.find("h", "dense") is None
    journal.append(record("failed", "first"))
    store.poll()
    found = store.find("h", "dense")
    assert found is not None and found.answer.status == "failed" and store.failures() == {found.position}
    journal.append(record("ok", "second"))
    journal.append(record("failed", "third"))
    with (tmp_path / "a.jsonl").open("ab") as stream:
        stream.write(b'{"kind": "sample", "torn')
    store.poll()
    found = store.find("h", "dense")
    assert found is not None and found.answer.predicted_answer == "second" and found.answer.micro == []
    assert store.find("other", "dense") is None and store.failures() == set()
    assert store.micro("h", "dense") == [[0, 0, 0.1, 0.2, 0.1, 5.0]]


def test_of_answers_with_equal_parameters_the_latest_is_reused(tmp_path: Path) -> None:
    """Whichever worker wrote it."""
    for worker, (time, code, text) in enumerate([(2.0, "b", "newer"), (1.0, "a", "older")]):
        answer = {"status": "ok", "predicted_answer": text}
        line = {
            "kind": "sample",
            "sample_id": "s",
            "sample_hash": "h",
            "limit": 1,
            "time": time,
            "answers": {f"p-{code}": answer},
        }
        Journal(tmp_path / f"worker-{worker}.jsonl").append(line)
    store = AnswerStore(tmp_path, ["p-c"])
    store.poll()
    found = store.find("h", "p-c")
    assert found is not None and found.answer.predicted_answer == "newer"


def test_long_fields_of_a_table_are_read(tmp_path: Path) -> None:
    csv.field_size_limit(131072)
    (tmp_path / "t.csv").write_text(table_text(["context"], [["x" * 200_000]]))
    assert len(read_table(tmp_path / "t.csv")[0]["context"]) == 200_000


def test_hashes_notice_what_matters(tiny_model: str, make_settings: Make) -> None:
    tokenizer = load_tokenizer(tiny_model)

    def identity(sample: Sample, limit: int, longest: int = 60, templated: bool = False) -> str:
        return make_prompt(sample, tokenizer, make_settings(), longest=longest, limit=limit, use_chat_template=templated)[1]

    sample = Sample("id", "t", "context", "question", "prefix", ["a", "b"], 10)
    base = identity(sample, 10)
    assert base == identity(sample, 10) == identity(replace(sample, references=["a", "c"]), 10, longest=50)
    assert len({base, identity(sample, 9), identity(sample, 10, longest=30)}) == 3
    changes = ({"context": "x"}, {"question": "x"}, {"answer_prefix": "x"}, {"references": ["x"]}, {"sample_id": "x"})
    for change in changes:
        assert base != identity(replace(sample, **change), 10)  # type: ignore[arg-type]
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    templated = identity(sample, 10, templated=True)
    tokenizer.chat_template = "{{ messages[0].content }} "
    assert len({base, templated, identity(sample, 10, templated=True)}) == 3
    # A prompt that cannot be made is identified by its text.
    assert identity(sample, 10, longest=5) != identity(replace(sample, context="x"), 10, longest=5)
    dense, local, sampling = toy_configs()
    assert len({config_key(c.config) for c in (dense, local, sampling)}) == 3
    assert config_key(local.config) == config_key(toy_configs()[1].config)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_seeds_belong_to_samples() -> None:
    assert answer_seed(0, "a") == answer_seed(0, "a")
    assert len({answer_seed(0, "a"), answer_seed(0, "b"), answer_seed(1, "a")}) == 3
    assert 0 <= answer_seed(0, "a") < 2**63


def test_batches_keep_contexts_together_and_busy_workers() -> None:
    def requests(contexts: str) -> list[Request]:
        return [Request(Sample(str(i), "t", c, "", "", [], 1), "h", 0, 1, ("dense",)) for i, c in enumerate(contexts)]

    assert [len(batch) for batch in make_batches(requests("aabbccdd"), 1)] == [4, 4]
    assert [len(batch) for batch in make_batches(requests("abcd"), 4)] == [1, 1, 1, 1]
    many = make_batches(requests("a" * 12 + "b" * 12), 2)
    assert [{r.sample.context for r in batch} for batch in many] == [{"a"}, {"a"}, {"b"}, {"b"}]
    assert sum(len(batch) for batch in make_batches(requests("abc" * 50), 3)) == 150
    assert make_batches([], 2) == []


def test_the_tree_and_what_its_files_hold(toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make) -> None:
    settings = make_settings(max_requests=4)
    outcome = run_benchmarks([toy_unit], settings, config_run="run_x", notes=["a note"], in_process=True)
    assert outcome.failures == [] and not outcome.interrupted
    base = settings.benchmark_results_dir / safe_name(toy_unit.model)
    for config in toy_unit.configs:
        folder = base / config.name / "toy_count"
        names = {"raw_results.csv", "metrics.json", "config.json"}
        if config.config is not None:
            names.add("micro_metrics.jsonl")
        assert {path.name for path in folder.iterdir()} == names

    folder = base / "sink_local_25pct" / "toy_count"
    with (folder / "raw_results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    data = ["context", "letter", "answers", "note"]
    metrics = ["overlap", "length"]
    own = ["reference_nll", "density", "error", "seconds", "status"]
    assert list(rows[0]) == [*data, "predicted_answer", *metrics, *own]
    assert rows[0]["note"] == 'a "quoted"\nline \\n'  # text comes back as it was
    assert json.loads(rows[0]["answers"]) and rows[0]["status"] == "ok"
    assert 0 < float(rows[0]["density"]) < 1 and float(rows[0]["error"]) > 0 and float(rows[0]["reference_nll"]) > 0

    found = json.loads((folder / "metrics.json").read_text())
    assert found["score"] == pytest.approx(sum(float(row["overlap"]) for row in rows) / 4)
    assert found["interval"][0] <= found["score"] <= found["interval"][1]
    assert found["perplexity"] == pytest.approx(math.exp(found["reference_nll"]))
    assert found["samples"]["ok"] == 4 and found["samples"]["capped"] == 4  # 8 of the task's 12 tokens
    assert found["difference_to_dense"]["n"] == 4 and found["aggregate"] == {"answered": 4}
    assert found["budget"] == 0.25 and found["over_budget"] is False

    config = json.loads((folder / "config.json").read_text())
    assert [entry["type"] for entry in config["sparse_config"]["masker_configs"]] == [
        "SinkMaskerConfig",
        "LocalMaskerConfig",
    ]
    assert config["hash"] and config["seed"] == 0 and config["dtype"] == "float32" and config["device"] == "cpu"
    assert config["sparse_from"] == "question" and "torch" in config["versions"] and "commit" in config["versions"]
    assert config["versions"]["template-date"] == "2024-07-26"
    assert config["config_run"] == "run_x" and config["provenance"]["config_run"] == "run_x"

    micro = [json.loads(line) for line in (folder / "micro_metrics.jsonl").read_text().splitlines()]
    assert {record["sample"] for record in micro} == {f"toy/count:{i}" for i in range(4)}

    summary = json.loads((settings.benchmark_results_dir / "benchmark_summary.json").read_text())
    assert summary["config_run_used"] == "run_x" and summary["notes"] == ["a note"]
    assert [entry["configuration"] for entry in summary["results"]] == [c.name for c in toy_unit.configs]
    assert summary["phase2_results"] == {"total": 3, "completed": 3, "partial": 0, "failed": 0, "skipped": 0}
    table = closing_table(outcome)
    assert max(map(len, table.splitlines())) <= 100 and "toy/count" in table


def test_a_missing_figure_is_empty_and_never_none_or_nan(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make
) -> None:
    settings = make_settings(max_requests=2, micro_metrics="off")
    run_benchmarks([toy_unit], settings, in_process=True)
    folder = settings.benchmark_results_dir / safe_name(toy_unit.model) / "sink_local_25pct" / "toy_count"
    with (folder / "raw_results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["error"] for row in rows} == {""} and all(row["density"] for row in rows)
    assert json.loads((folder / "metrics.json").read_text())["error"] is None
    assert (folder / "micro_metrics.jsonl").read_text() == ""


def test_the_table_marks_what_needs_a_look(toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make) -> None:
    summary = run_benchmarks([toy_unit], make_settings(max_requests=2), in_process=True)
    dense, *_ = summary.results
    dense = dense.model_copy(update={"model": "m" * 60, "task": "loogle/longdep_summarization", "error": 12.5})
    difference = Difference(difference=-0.125, interval=(-0.25, -0.01), n=2, better=0, worse=2, p_value=0.5)
    failed = dense.samples.model_copy(update={"failed": 1})
    summary.results = [
        dense.model_copy(update={"interval": None}),
        dense.model_copy(update={"configuration": "x" * 80 + "_5pct", "over_budget": True, "difference_to_dense": difference}),
        dense.model_copy(update={"configuration": "b_5pct", "samples": failed, "meets_budget": False}),
    ]
    table = closing_table(summary)
    assert max(map(len, table.splitlines())) <= 100
    assert "_5pct" in table and "-0.125 [-0.25, -0.01] !" in table and "~?" in table
    summary.results = []
    assert closing_table(summary) == ""


def test_answers_of_several_precisions_are_noted(toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make) -> None:
    """--dtype auto is another one on another machine, where the same journal grows."""
    settings = make_settings(max_requests=2)
    assert run_benchmarks([toy_unit], settings, in_process=True).notes == []
    (journal,) = settings.benchmark_results_dir.rglob("worker-0.jsonl")
    first, second = journal.read_text().splitlines()
    journal.write_text(f"{first}\n{second.replace('float32', 'bfloat16', 1)}\n")
    outcome = run_benchmarks([toy_unit], replace(settings, rescore=True), in_process=True)
    assert any("some answers are bfloat16 on sdpa, others float32 on sdpa: give --dtype" in note for note in outcome.notes)
