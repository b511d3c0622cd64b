"""Phase 2: nothing is lost, nothing is run twice, and an error affects only what it happened to."""

from __future__ import annotations

import csv
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import benchmark.execution.answer_sample as answer_sample
import benchmark.execution.prompts as prompts
import benchmark.execution.runner as execution
import benchmark.execution.worker as worker
from benchmark.execution.jobs import UnitRun
from benchmark.execution.runner import BenchmarkUnit, run_benchmarks
from benchmark.execution.scheduler import QueuedBatch, Schedule
from benchmark.execution.worker import Batch, answer_batch
from benchmark.settings import Settings, SparseConfig
from benchmark.speed.toy import save_tiny_model
from benchmark.storage.benchmark_records import SampleLine, WorkerStatus
from benchmark.storage.records import Failure, to_json
from benchmark.storage.results import Journal, safe_name
from benchmark.workers.pools import ProcessPools, Slot, WorkerDied, plan_slots
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.models import load_tokenizer
from tests.toy import ToyTask

Make = Callable[..., Settings]


@pytest.fixture(autouse=True)
def _no_model_stays() -> Iterator[None]:
    yield
    worker.forget_model()


class ScriptedPool:
    """Runs batches in this process, but each as its script says: "ok", "die N" or "late N" after N samples, "start"
    (dies before the batch begins), or an exception to raise. The script's last word repeats."""

    made: list[ScriptedPool] = []

    def __init__(self, slots: list[Slot], log: Path | None, script: list[Any]) -> None:
        self.slots, self.script = slots, script
        self.batches: list[Batch] = []
        self.renewed = 0
        ScriptedPool.made.append(self)

    def submit(self, slot: int, batch: Batch, timeout: float | None) -> Future[int]:
        self.batches.append(batch)
        word = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        future: Future[int] = Future()
        if isinstance(word, Exception):
            future.set_exception(word)
            return future
        kind, _, count = word.partition(" ")
        if kind == "start":
            future.set_exception(WorkerDied("by signal SIGKILL"))
            return future
        done = 0
        for record in answer_batch(batch):
            if kind != "ok" and done == int(count):
                break  # killed in the middle of this sample
            batch.keep(record)
            done += 1
        if kind == "die":
            future.set_exception(WorkerDied("by signal SIGKILL"))
        elif kind == "late":
            future.set_exception(TimeoutError())
        else:
            future.set_result(done)
        return future

    def renew(self, slot: int) -> None:
        self.renewed += 1

    def kill(self) -> None:
        pass


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(*script: Any) -> None:
        monkeypatch.setattr(execution, "ProcessPools", lambda slots, log: ScriptedPool(slots, log, list(script)))

    return use


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...]]]:
    """(sample, configurations) of every time a sample is answered."""
    seen: list[tuple[str, tuple[str, ...]]] = []
    real = worker.answer_sample

    def count(request: Any, *rest: Any) -> SampleLine:
        seen.append((request.sample.sample_id, request.configs))
        return real(request, *rest)

    monkeypatch.setattr(worker, "answer_sample", count)
    return seen


def result_files(base: Path) -> dict[str, Any]:
    """Every result file, without times."""
    found: dict[str, Any] = {}
    for path in sorted(base.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(base).parts)
        if hidden or not path.is_file():
            continue
        text = path.read_text()
        if path.name == "raw_results.csv":
            rows = list(csv.DictReader(text.splitlines(keepends=True)))
            found[str(path.relative_to(base))] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines()]
            found[str(path.relative_to(base))] = [{k: v for k, v in line.items() if k != "timestamp"} for line in lines]
        else:
            found[str(path.relative_to(base))] = _timeless(json.loads(text))
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in ("seconds", "timestamp")}
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value


def statuses(settings: Settings, unit: BenchmarkUnit, name: str = "dense") -> list[str]:
    folder = settings.benchmark_results_dir / safe_name(unit.model) / name / safe_name(unit.task)
    with (folder / "raw_results.csv").open(newline="") as stream:
        return [row["status"] for row in csv.DictReader(stream)]


def samples_hash(settings: Settings, unit: BenchmarkUnit) -> str:
    folder = settings.benchmark_results_dir / safe_name(unit.model) / "dense" / safe_name(unit.task)
    return str(json.loads((folder / "config.json").read_text())["samples_hash"])


# -- answers ---------------------------------------------------------------------------------------------------------


def test_lockstep_answers_are_those_of_each_configuration_alone(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, tmp_path: Path
) -> None:
    together = make_settings()
    run_benchmarks([toy_unit], together, in_process=True)
    alone = make_settings(benchmark_results_dir=tmp_path / "alone")
    for config in toy_unit.configs:  # one after the other: each is added to what is there
        run_benchmarks([replace(toy_unit, configs=(config,))], alone, in_process=True)
    for config in toy_unit.configs:
        name = f"{safe_name(toy_unit.model)}/{config.name}/toy_count/raw_results.csv"
        one, other = result_files(together.benchmark_results_dir)[name], result_files(tmp_path / "alone")[name]
        assert [row["predicted_answer"] for row in one] == [row["predicted_answer"] for row in other]
        for a, b in zip(one, other, strict=True):
            for column in ("reference_nll", "density", "error"):
                assert float(a[column]) == pytest.approx(float(b[column]), abs=1e-5)


def test_two_runs_write_the_same_files_but_for_times(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        run_benchmarks([toy_unit], make_settings(benchmark_results_dir=tmp_path / name), in_process=True)
    assert result_files(tmp_path / "one") == result_files(tmp_path / "two")


def test_answers_are_as_long_as_task_and_flag_allow(toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make) -> None:
    outcome = run_benchmarks([toy_unit], make_settings(max_new_tokens=200), in_process=True)
    assert [entry.samples.capped for entry in outcome.results] == [0, 0, 0]  # the task's own 12
    outcome = run_benchmarks([toy_unit], make_settings(max_new_tokens=3), in_process=True)
    assert [entry.samples.capped for entry in outcome.results] == [4, 4, 4]


def test_a_context_is_prefilled_once_for_all_questions_and_configurations(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sparse_attention_hub.models as models

    real, calls = models.prefill, []

    def count(lm: Any, ids: list[int], *rest: Any) -> Any:
        calls.append(len(ids))
        return real(lm, ids, *rest)

    monkeypatch.setattr(models, "prefill", count)
    run_benchmarks([toy_unit], make_settings(), in_process=True)
    assert len(calls) == 2  # four samples, two on each context, three configurations


def test_short_memory_halves_the_batch_until_it_fits(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sparse_attention_hub.models as models

    real, sizes = models.answer_many, []

    def short(lm: Any, prefilled: Any, ids: Any, attentions: list[Any], *rest: Any, **options: Any) -> Any:
        sizes.append(len(attentions))
        if len(attentions) > 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return real(lm, prefilled, ids, attentions, *rest, **options)

    monkeypatch.setattr(models, "answer_many", short)
    outcome = run_benchmarks([toy_unit], make_settings(max_requests=2), in_process=True)
    assert outcome.failures == [] and all(entry.samples.ok == 2 for entry in outcome.results)
    assert sizes == [3, 1, 2, 1, 1] + [1, 1, 1]  # the second sample does not try what failed before


def test_short_memory_at_a_long_context_leaves_shorter_ones_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def ask(keys: list[str]) -> list[str]:
        tried.append((length, len(keys)))
        if length >= 60 and len(keys) > 1:
            raise RuntimeError("CUDA out of memory")
        return keys

    monkeypatch.setattr(answer_sample._PrefilledSample, "_fitting", lambda self, keys: len(keys))
    nothing: Any = None
    loaded = answer_sample.LoadedModel((), nothing, Settings((), ()), attentions=dict.fromkeys("abc"))
    for length in (60, 40, 70, 60):
        prefilled: Any = SimpleNamespace(context_length=length, forget=lambda: None)
        sample = answer_sample._PrefilledSample(nothing, nothing, loaded, prefilled)
        assert list(sample._in_groups(list("abc"), ask)) == [("a", "a"), ("b", "b"), ("c", "c")]
    assert tried == [(60, 3), (60, 1), (60, 2), (60, 1), (60, 1), (40, 3), *[(70, 1)] * 3, *[(60, 1)] * 3]


def test_a_configuration_that_is_short_alone_is_asked_once_more_with_memory_cleared(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sparse_attention_hub.models as models

    real, short = models.answer_many, [True, True]

    def crowded(lm: Any, prefilled: Any, ids: Any, attentions: list[Any], *rest: Any, **options: Any) -> Any:
        if any(attention is not None for attention in attentions) and short:
            short.pop()
            raise RuntimeError("CUDA out of memory")
        return real(lm, prefilled, ids, attentions, *rest, **options)

    monkeypatch.setattr(models, "answer_many", crowded)
    unit = replace(toy_unit, configs=toy_unit.configs[:2])
    outcome = run_benchmarks([unit], make_settings(max_requests=1), in_process=True)
    assert outcome.failures == [] and not short


def test_the_batch_is_made_to_fit_before_it_is_tried(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sparse_attention_hub.models as models

    real, sizes = models.answer_many, []

    def watch(lm: Any, prefilled: Any, ids: Any, attentions: list[Any], *rest: Any, **options: Any) -> Any:
        sizes.append(len(attentions))
        return real(lm, prefilled, ids, attentions, *rest, **options)

    monkeypatch.setattr(models, "answer_many", watch)
    monkeypatch.setattr(models, "estimate_bytes", lambda lm, context, room, group, asked: 10**9 if len(group) > 2 else 1)
    monkeypatch.setattr(answer_sample, "free_memory", lambda device, workers: 10**8)
    run_benchmarks([toy_unit], make_settings(max_requests=1), in_process=True)
    assert sizes == [1, 2] or sizes == [2, 1]


def test_a_failing_configuration_fails_alone_and_counts_in_no_mean(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sparse_attention_hub.models as models

    real = models.answer_many

    def sabotage(lm: Any, prefilled: Any, ids: Any, attentions: list[Any], *rest: Any, **options: Any) -> Any:
        if any(attention is not None and len(attention.maskers) == 3 for attention in attentions):
            raise ZeroDivisionError("broken masker")
        return real(lm, prefilled, ids, attentions, *rest, **options)

    monkeypatch.setattr(models, "answer_many", sabotage)
    settings = make_settings()
    outcome = run_benchmarks([toy_unit], settings, in_process=True)
    dense, local, sampling = outcome.results
    assert dense.samples.ok == local.samples.ok == 4
    assert sampling.samples.failed == 4 and sampling.score is None and sampling.density is None
    assert {entry.problem for entry in outcome.failures} == {"ZeroDivisionError: broken masker"}
    name = toy_unit.configs[2].name
    assert statuses(settings, toy_unit, name) == ["failed"] * 4
    folder = settings.benchmark_results_dir / safe_name(toy_unit.model) / name / "toy_count"
    assert (folder / "micro_metrics.jsonl").read_text() == ""  # nothing of a neighbour's

    monkeypatch.setattr(models, "answer_many", real)  # mended: only what failed is run
    outcome = run_benchmarks([toy_unit], settings, in_process=True)
    assert outcome.failures == [] and outcome.results[2].samples.ok == 4


def test_a_configuration_that_cannot_be_made_fails_alone(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, tmp_path: Path
) -> None:
    from sparse_attention_hub import HashAttentionTopKMaskerConfig, ResearchAttentionConfig

    moved = ResearchAttentionConfig(
        [HashAttentionTopKMaskerConfig(0.1, 32, 3, 128, "silu", hat_weight_file=str(tmp_path / "moved"))]
    )
    unit = replace(toy_unit, configs=(*toy_unit.configs, SparseConfig("hash_attention_10pct", moved, ())))
    settings = make_settings()
    outcome = run_benchmarks([unit], settings, in_process=True)
    assert {entry.configuration for entry in outcome.failures} == {"hash_attention_10pct"}
    assert "moved" in outcome.failures[0].problem and statuses(settings, unit, "hash_attention_10pct") == ["failed"] * 4
    for config in toy_unit.configs:
        assert statuses(settings, unit, config.name) == ["ok"] * 4


def test_text_that_cannot_be_encoded_fails_its_sample_only(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer may refuse a prompt, or a reference."""
    build, encode = prompts.build_prompt, prompts.reference_ids

    def build_prompt(sample: Any, *rest: Any, **options: Any) -> Any:
        if sample.sample_id == "toy/count:2":
            raise ValueError("no such character")
        return build(sample, *rest, **options)

    def reference_ids(tokenizer: Any, prompt: Any, reference: str) -> list[int]:
        if reference == second:
            raise ValueError("no such character")
        return encode(tokenizer, prompt, reference)

    second = toy_task.samples(_request())[1].references[0]
    monkeypatch.setattr(prompts, "build_prompt", build_prompt)
    for module in (prompts, answer_sample):
        monkeypatch.setattr(module, "reference_ids", reference_ids)
    settings = make_settings()
    run_benchmarks([toy_unit], settings, in_process=True)
    assert statuses(settings, toy_unit) == ["ok", "ok", "failed", "ok"]
    folder = settings.benchmark_results_dir / safe_name(toy_unit.model) / "dense" / "toy_count"
    rows = list(csv.DictReader((folder / "raw_results.csv").open(newline="", encoding="utf-8")))
    assert rows[1]["reference_nll"] == "" and rows[0]["reference_nll"] != ""


def test_files_that_cannot_be_written_are_a_failure_and_the_rest_goes_on(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, monkeypatch: pytest.MonkeyPatch, counted: list[Any]
) -> None:
    real = execution.write_unit

    def full(run: UnitRun, config_run: str | None) -> Any:
        if run.unit.task == "toy/other":
            raise OSError("no space left on device")
        return real(run, config_run)

    monkeypatch.setattr(execution, "write_unit", full)
    settings = make_settings(max_requests=2)
    units = [replace(toy_unit, task="toy/other"), toy_unit]
    outcome = run_benchmarks(units, settings, in_process=True)
    (problem,) = outcome.failures
    assert problem.task == "toy/other" and "no space left" in problem.problem
    assert len(outcome.results) == 3 and len(counted) == 4
    monkeypatch.setattr(execution, "write_unit", real)
    assert run_benchmarks(units, settings, in_process=True).failures == [] and len(counted) == 4


def test_a_question_too_long_for_the_context_is_a_failure_record(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make
) -> None:
    outcome = run_benchmarks([toy_unit], make_settings(max_context_length=20), in_process=True)
    assert all(entry.samples.failed == 4 for entry in outcome.results)
    assert "--max-context-length" in outcome.failures[0].problem


def test_truncated_contexts_are_counted(toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make) -> None:
    outcome = run_benchmarks([toy_unit], make_settings(max_context_length=100), in_process=True)
    assert [entry.samples.truncated for entry in outcome.results] == [4, 4, 4]


# -- scoring ---------------------------------------------------------------------------------------------------------


def test_a_metric_that_raises_marks_its_sample_and_keeps_the_answer(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, counted: list[Any]
) -> None:
    settings = make_settings()
    good = toy_task.score_answer

    def bad(prediction: str, references: Any, all_classes: Any = None) -> dict[str, float]:
        if len(counted) and references == first:
            raise KeyError("no such class")
        return good(prediction, references, all_classes)

    first = toy_task.samples(_request())[0].references
    toy_task.score_answer = bad  # type: ignore[method-assign]
    outcome = run_benchmarks([toy_unit], settings, in_process=True)
    marked = outcome.results[0].samples
    assert marked.unscored >= 1 and marked.ok == 4 - marked.unscored
    folder = settings.benchmark_results_dir / safe_name(toy_unit.model) / "dense" / "toy_count"
    with (folder / "raw_results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows[0]["status"] == "unscored" and rows[0]["predicted_answer"] and rows[0]["overlap"] == ""

    toy_task.score_answer = good  # type: ignore[method-assign]
    before = len(counted)
    outcome = run_benchmarks([toy_unit], replace(settings, rescore=True), in_process=True)
    assert len(counted) == before  # nothing was run
    assert outcome.results[0].samples.ok == 4 and outcome.failures == []


def test_rescoring_says_what_is_missing(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, counted: list[Any]
) -> None:
    settings = make_settings(max_requests=2)
    run_benchmarks([toy_unit], settings, in_process=True)
    outcome = run_benchmarks([toy_unit], replace(settings, rescore=True, max_requests=4), in_process=True)
    assert outcome.results[0].samples.missing == outcome.results[0].samples.ok == 2
    assert len(counted) == 2


def test_rescoring_leaves_alone_what_has_no_recorded_answers(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, counted: list[Any]
) -> None:
    settings = make_settings(max_requests=2)
    run_benchmarks([toy_unit], settings, in_process=True)
    before = result_files(settings.benchmark_results_dir)
    with pytest.raises(UserError, match="--rescore.*seed: 0 -> 5"):
        run_benchmarks([toy_unit], replace(settings, rescore=True, seed=5), in_process=True)
    with pytest.raises(UserError, match="--rescore"):  # answers of other lengths in the same journal
        run_benchmarks([toy_unit], replace(settings, rescore=True, max_new_tokens=3), in_process=True)
    assert result_files(settings.benchmark_results_dir) == before

    from sparse_attention_hub import ResearchAttentionConfig, SinkMaskerConfig

    other = SparseConfig("sink_local_25pct", ResearchAttentionConfig([SinkMaskerConfig(sink_size=9)]), (SinkMaskerConfig,))
    unit = replace(toy_unit, configs=(toy_unit.configs[0], other))
    outcome = run_benchmarks([unit, replace(unit, task="toy/other")], replace(settings, rescore=True), in_process=True)
    assert [entry.configuration for entry in outcome.results] == ["dense"] and len(counted) == 2
    told = [(entry.task, entry.configuration) for entry in outcome.failures]
    assert told == [("toy/count", "sink_local_25pct"), ("toy/other", None)]
    after = result_files(settings.benchmark_results_dir)
    assert after.pop("benchmark_summary.json") != before.pop("benchmark_summary.json") and after == before


def _request() -> Any:
    from benchmark.tasks.base import SampleRequest

    return SampleRequest(tokenizer=None, max_samples=4)


# -- resuming --------------------------------------------------------------------------------------------------------


def test_nothing_is_run_twice_and_more_samples_add_to_what_is_there(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, counted: list[Any]
) -> None:
    settings = make_settings(max_requests=2)
    first = run_benchmarks([toy_unit], settings, in_process=True)
    again = run_benchmarks([toy_unit], settings, in_process=True)  # all is done: no work, the same results
    assert _timeless(to_json(first)) == _timeless(to_json(again)) and len(counted) == 2
    run_benchmarks([toy_unit], replace(settings, max_requests=4), in_process=True)
    assert [sample for sample, _ in counted] == [f"toy/count:{i}" for i in range(4)]


def test_a_configuration_added_later_runs_alone(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, counted: list[Any]
) -> None:
    settings = make_settings()
    run_benchmarks([replace(toy_unit, configs=toy_unit.configs[:2])], settings, in_process=True)
    run_benchmarks([toy_unit], settings, in_process=True)
    assert [len(configs) for _, configs in counted] == [2] * 4 + [1] * 4


def test_one_configuration_under_two_names_is_run_once(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, counted: list[Any]
) -> None:
    local = toy_unit.configs[1]
    unit = replace(toy_unit, configs=(*toy_unit.configs, SparseConfig("other_50pct", local.config, local.masker_classes)))
    outcome = run_benchmarks([unit], make_settings(), in_process=True)
    assert {len(configs) for _, configs in counted} == {3} and len(outcome.results) == 4
    assert outcome.results[1].score == outcome.results[3].score


def test_changed_settings_keep_the_old_results_and_are_noted(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, counted: list[Any]
) -> None:
    settings = make_settings()
    run_benchmarks([toy_unit], settings, in_process=True)
    outcome = run_benchmarks([toy_unit], replace(settings, sparse_from="decode"), in_process=True)
    assert len(counted) == 8
    assert any("sparse_from: question -> decode" in note for note in outcome.notes)
    base = settings.benchmark_results_dir / safe_name(toy_unit.model) / "sink_local_25pct"
    aside = [path for path in base.iterdir() if path.name != "toy_count"]
    assert len(aside) == 1 and json.loads((aside[0] / "config.json").read_text())["sparse_from"] == "question"
    assert json.loads((base / "toy_count" / "config.json").read_text())["sparse_from"] == "decode"
    run_benchmarks([toy_unit], settings, in_process=True)  # back again: nothing to run
    assert len(counted) == 8


def test_changed_data_and_changed_configurations_are_noticed(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, counted: list[Any]
) -> None:
    settings = make_settings(max_requests=2)
    run_benchmarks([toy_unit], settings, in_process=True)
    toy_task.context += 1
    run_benchmarks([toy_unit], settings, in_process=True)
    assert len(counted) == 4
    from sparse_attention_hub import ResearchAttentionConfig, SinkMaskerConfig

    other = SparseConfig("sink_local_25pct", ResearchAttentionConfig([SinkMaskerConfig(sink_size=9)]), (SinkMaskerConfig,))
    run_benchmarks([replace(toy_unit, configs=(toy_unit.configs[0], other))], settings, in_process=True)
    assert [len(configs) for _, configs in counted[4:]] == [1, 1]


def test_answers_to_other_tokens_are_never_reused(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, counted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another chat template, or another way of encoding, makes other samples of the same data."""
    monkeypatch.setattr(toy_task, "use_chat_template", True, raising=False)
    settings, tokenizer, load = make_settings(), load_tokenizer(toy_unit.model), worker._load

    def with_template(batch: Batch) -> Any:
        loaded = load(batch)
        loaded.lm = replace(loaded.lm, tokenizer=tokenizer)
        return loaded

    def run(template: str, **changes: Any) -> Any:
        tokenizer.chat_template = template
        return run_benchmarks([toy_unit], replace(settings, **changes), in_process=True, tokenizers={toy_unit.model: tokenizer})

    monkeypatch.setattr(worker, "_load", with_template)

    run("U {{ messages[0].content }} A")
    first = samples_hash(settings, toy_unit)
    run("U {{ messages[0].content }} A")
    assert len(counted) == 4 and samples_hash(settings, toy_unit) == first
    with pytest.raises(UserError, match="--rescore"):
        run("V {{ messages[0].content }} A", rescore=True)
    outcome = run("V {{ messages[0].content }} A")
    assert len(counted) == 8 and all("other data or prompts" in note for note in outcome.notes)
    assert samples_hash(settings, toy_unit) != first
    run("U {{ messages[0].content }} A", rescore=True)
    assert len(counted) == 8 and samples_hash(settings, toy_unit) == first

    encode = prompts.encode_continuation  # of the reference: another reference_nll, though the prompt is the same
    monkeypatch.setattr(prompts, "encode_continuation", lambda tokenizer, text: encode(tokenizer, text + "."))
    run("U {{ messages[0].content }} A")
    assert len(counted) == 12


def test_a_worker_that_encodes_otherwise_answers_nothing(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make
) -> None:
    other = load_tokenizer(toy_unit.model)
    toy_task.use_chat_template = True
    other.chat_template = "U {{ messages[0].content }} A"
    outcome = run_benchmarks([toy_unit], make_settings(), in_process=True, tokenizers={toy_unit.model: other})
    assert len(outcome.failures) == 12 and all("encodes this prompt" in failure.problem for failure in outcome.failures)


def test_results_of_changed_data_keep_their_files_and_fewer_samples_are_no_change(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, counted: list[Any]
) -> None:
    settings = make_settings()
    run_benchmarks([toy_unit], settings, in_process=True)
    for count in (2, 4):
        outcome = run_benchmarks([toy_unit], replace(settings, max_requests=count), in_process=True)
        assert outcome.notes == [] and len(counted) == 4
    base = settings.benchmark_results_dir / safe_name(toy_unit.model) / "dense"
    first = (base / "toy_count" / "raw_results.csv").read_text()
    good = toy_task.samples

    def edited(request: Any) -> Any:  # a reference that no answer depends on
        samples = good(request)
        return [*samples[:-1], replace(samples[-1], references=[*samples[-1].references, "7"])]

    toy_task.samples = edited  # type: ignore[method-assign]
    outcome = run_benchmarks([toy_unit], settings, in_process=True)
    assert len(counted) == 4 and all("other data" in note for note in outcome.notes)
    (aside,) = (path for path in base.iterdir() if path.name != "toy_count")
    assert (aside / "raw_results.csv").read_text() == first
    toy_task.context += 1
    run_benchmarks([toy_unit], settings, in_process=True)
    assert len(list(base.iterdir())) == 3  # the second change displaces nothing of the first


def test_a_torn_journal_and_half_files_do_not_count_as_done(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, counted: list[Any], tmp_path: Path
) -> None:
    settings = make_settings()
    run_benchmarks([toy_unit], settings, in_process=True)
    whole = result_files(settings.benchmark_results_dir)
    (journal,) = settings.benchmark_results_dir.rglob("worker-0.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:100])
    (raw,) = (settings.benchmark_results_dir / safe_name(toy_unit.model) / "dense").rglob("raw_results.csv")
    raw.write_text(raw.read_text()[:200])
    run_benchmarks([toy_unit], settings, in_process=True)
    assert len(counted) == 5 and result_files(settings.benchmark_results_dir) == whole


def test_force_runs_again_and_keeps_the_old_answers(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, counted: list[Any]
) -> None:
    settings = make_settings(max_requests=2)
    run_benchmarks([toy_unit], settings, in_process=True)
    run_benchmarks([toy_unit], replace(settings, force_benchmark=True), in_process=True)
    assert len(counted) == 4
    assert len(list(settings.benchmark_results_dir.rglob("*.replaced-*"))) == 1
    folder = settings.benchmark_results_dir / safe_name(toy_unit.model) / "sink_local_25pct" / "toy_count"
    lines = (folder / "micro_metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) and {json.loads(line)["step"] for line in lines} <= set(range(8))


def test_an_interrupted_forced_run_resumes_and_the_next_one_reruns_all(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, counted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(force_benchmark=True)
    run_benchmarks([toy_unit], make_settings(), in_process=True)
    whole, real = result_files(settings.benchmark_results_dir), worker.answer_sample
    time.sleep(0.02)

    def stop(request: Any, *rest: Any) -> SampleLine:
        if request.sample.sample_id == "toy/count:1":
            os.kill(os.getpid(), signal.SIGINT)
        return real(request, *rest)

    monkeypatch.setattr(worker, "answer_sample", stop)
    assert run_benchmarks([toy_unit], settings, in_process=True).interrupted
    monkeypatch.setattr(worker, "answer_sample", real)
    counted.clear()
    outcome = run_benchmarks([toy_unit], settings, in_process=True)
    assert [sample for sample, _ in counted] == ["toy/count:2", "toy/count:3"]
    assert any("--force-benchmark: continues" in note for note in outcome.notes)
    found = result_files(settings.benchmark_results_dir)
    found["benchmark_summary.json"]["notes"] = []
    assert found == whole
    counted.clear()
    run_benchmarks([toy_unit], settings, in_process=True)
    assert len(counted) == 4


def test_a_forced_run_that_ended_without_the_flag_has_ended(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, counted: list[Any]
) -> None:
    settings, identities = make_settings(max_requests=1), list[str]()
    kept = execution.ForcedRun

    class Kept(kept):  # type: ignore[misc, valid-type]
        def __init__(self, folder: Path, flag: str, identity: str) -> None:
            super().__init__(folder, flag, identity)
            identities.append(identity)

    execution.ForcedRun = Kept  # type: ignore[misc]
    try:
        run_benchmarks([toy_unit], settings, in_process=True)
    finally:
        execution.ForcedRun = kept  # type: ignore[misc]
    shutil.rmtree(settings.benchmark_results_dir)
    kept(settings.benchmark_results_dir, "--force-benchmark", identities[0]).begin()  # as a killed run leaves it
    run_benchmarks([toy_unit], settings, in_process=True)  # answers what that run would have
    counted.clear()
    run_benchmarks([toy_unit], replace(settings, force_benchmark=True), in_process=True)
    assert len(counted) == 1, "the flag answers again"


def test_rescoring_finds_the_answers_of_another_kind_of_device(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, counted: list[Any]
) -> None:
    settings = make_settings(max_requests=1)
    run_benchmarks([toy_unit], settings, in_process=True)
    here, there = (UnitRun(toy_unit, settings, kind).folder for kind in ("cpu", "cuda"))
    here.rename(there)
    outcome = run_benchmarks([toy_unit], replace(settings, device="auto", rescore=True), in_process=True)
    assert outcome.results[0].samples.ok == 1 and len(counted) == 1


def test_a_new_version_is_noted_and_rescoring_finds_the_old_answers(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, counted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings()
    run_benchmarks([toy_unit], settings, in_process=True)
    whole = result_files(settings.benchmark_results_dir)
    monkeypatch.setattr("sparse_attention_hub.attention.ENGINE_VERSION", "edited")
    counted.clear()
    outcome = run_benchmarks([toy_unit], replace(settings, rescore=True), in_process=True)
    assert counted == [] and outcome.failures == []
    assert all(result.samples.ok == 4 for result in outcome.results)
    for name, rows in result_files(settings.benchmark_results_dir).items():
        if name.endswith(("raw_results.csv", "micro_metrics.jsonl")) and name in whole:
            assert rows == whole[name]
    outcome = run_benchmarks([toy_unit], settings, in_process=True)
    assert len(counted) == 4
    names = ", ".join(config.name for config in toy_unit.configs)
    assert any(
        f"code or files of maskers changed, so these configurations run again: {names}" in note for note in outcome.notes
    )


def test_two_runs_do_not_share_a_results_folder(toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make) -> None:
    settings = make_settings()
    with execution.results_lock(settings.benchmark_results_dir), pytest.raises(UserError, match="another run"):
        run_benchmarks([toy_unit], settings, in_process=True)


# -- workers, by script ----------------------------------------------------------------------------------------------


def test_a_crashed_workers_batch_resumes_from_its_journal(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, scripted: Callable[..., None], tmp_path: Path
) -> None:
    calm = make_settings(max_requests=8, benchmark_results_dir=tmp_path / "calm")
    run_benchmarks([toy_unit], calm, in_process=True)
    scripted("die 1", "die 1", "die 0", "die 2", "start", "ok")
    settings = make_settings(max_requests=8)
    outcome = run_benchmarks([toy_unit], settings)
    assert outcome.failures == [] and ScriptedPool.made[-1].renewed == 5
    assert result_files(settings.benchmark_results_dir) == result_files(tmp_path / "calm")


def test_a_sample_that_kills_three_workers_is_recorded_as_failed_and_its_neighbours_live(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, scripted: Callable[..., None]
) -> None:
    scripted("die 0", "die 0", "die 0", "ok")
    settings = make_settings()
    outcome = run_benchmarks([toy_unit], settings)
    assert statuses(settings, toy_unit) == ["failed", "ok", "ok", "ok"]
    assert {entry.sample_id for entry in outcome.failures} == {"toy/count:0"}
    assert "3 times" in outcome.failures[0].problem
    # Dying while starting changes nothing of that.
    scripted("die 0", "die 0", "start", "die 0", "ok")
    run_benchmarks([toy_unit], replace(settings, force_benchmark=True))
    again = [batch.most for batch in ScriptedPool.made[-1].batches if batch.requests[0].sample.sample_id == "toy/count:0"]
    assert again == [None, None, 1, 1]
    # The last try asks one configuration at a time: what killed may have been the lack of memory.
    tries = [batch.most for batch in ScriptedPool.made[-2].batches if batch.requests[0].sample.sample_id == "toy/count:0"]
    assert tries == [None, None, 1]


def test_deaths_that_let_a_sample_through_never_count(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, scripted: Callable[..., None]
) -> None:
    scripted(*["die 1"] * 9, "ok")
    outcome = run_benchmarks([toy_unit], make_settings(max_requests=10))
    assert outcome.failures == []


def test_workers_that_die_together_while_loading_are_not_the_models_fault(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, scripted: Callable[..., None]
) -> None:
    """A machine of eight workers goes down twice."""
    scripted(*["start"] * 16, "ok")
    outcome = run_benchmarks([toy_unit], make_settings(max_requests=20, max_new_tokens=2, max_concurrent_benchmarks=8))
    assert outcome.failures == []


def test_a_worker_that_cannot_load_does_not_lose_the_model_for_others(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, scripted: Callable[..., None]
) -> None:
    scripted("ok", UserError("model 'x' does not fit into the GPU's memory"), "ok")
    outcome = run_benchmarks([toy_unit], make_settings(max_requests=10))
    assert outcome.failures == [] and len(ScriptedPool.made[-1].batches) > 2


def test_the_rest_of_a_crashed_batch_comes_before_other_units() -> None:
    unit, other = (cast(Any, SimpleNamespace(unit=SimpleNamespace(model="m"), remaining=tuple, name="n")) for _ in range(2))
    requests = tuple(cast(Any, SimpleNamespace(sample=SimpleNamespace(sample_id=name))) for name in "abc")
    schedule = Schedule(60.0, lambda text: None)
    schedule.queue.append(QueuedBatch(other, ()))
    schedule.crashed(QueuedBatch(unit, requests), "by SIGKILL", WorkerStatus(sample="a"))
    assert [(batch.run is unit, len(batch.requests)) for batch in schedule.queue] == [(True, 1), (True, 2), (False, 0)]


def test_a_model_that_cannot_be_loaded_fails_its_unit_and_no_other(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, scripted: Callable[..., None]
) -> None:
    scripted("start")
    settings = make_settings()
    outcome = run_benchmarks([toy_unit], settings)
    assert statuses(settings, toy_unit) == ["failed"] * 4
    assert "while loading the model" in outcome.failures[0].problem
    scripted(UserError("model 'x' does not fit into the GPU's memory"), "ok")
    outcome = run_benchmarks([toy_unit], settings)
    assert statuses(settings, toy_unit) == ["failed"] * 4
    assert "does not fit" in outcome.failures[0].problem


def test_a_timeout_ends_its_task_and_is_recorded(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, scripted: Callable[..., None]
) -> None:
    scripted("ok", "late 1")
    settings = make_settings(max_requests=8)
    outcome = run_benchmarks([toy_unit], settings)
    found = statuses(settings, toy_unit)
    assert found.count("timeout") == 8 - found.count("ok") >= 1
    assert outcome.results[0].samples.timed_out == found.count("timeout")
    assert all("--benchmark-timeout" in entry.problem for entry in outcome.failures)
    scripted("ok")
    outcome = run_benchmarks([toy_unit], settings)
    assert outcome.failures == [] and statuses(settings, toy_unit) == ["ok"] * 8


def test_an_error_of_a_batch_fails_that_batch_only(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, scripted: Callable[..., None]
) -> None:
    scripted(OSError("disk full"), "ok")
    settings = make_settings(max_requests=8)
    run_benchmarks([toy_unit], settings)
    found = statuses(settings, toy_unit)
    assert "failed" in found and "ok" in found


def test_more_batches_than_workers_all_get_done(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, scripted: Callable[..., None]
) -> None:
    scripted("ok")
    settings = make_settings(max_requests=20, max_new_tokens=2, max_concurrent_benchmarks=3)
    outcome = run_benchmarks([toy_unit], settings)
    assert outcome.failures == [] and len(ScriptedPool.made[-1].batches) > 3
    assert len(ScriptedPool.made[-1].slots) == 3


def test_a_task_without_data_is_a_failure_and_the_rest_goes_on(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import benchmark.execution.jobs as jobs

    class Absent(ToyTask):
        def samples(self, request: Any) -> Any:
            raise UserError("toy/absent: its data are not there, pass --data-dir")

    monkeypatch.setattr(jobs, "get_task", lambda name: Absent(name=name) if name == "toy/absent" else toy_task)
    outcome = run_benchmarks([replace(toy_unit, task="toy/absent"), toy_unit], make_settings(), in_process=True)
    assert [entry.problem for entry in outcome.failures] == ["toy/absent: its data are not there, pass --data-dir"]
    assert to_json(outcome.phase2_results) == {"total": 6, "completed": 3, "partial": 0, "failed": 3, "skipped": 0}


def test_what_failed_in_the_search_is_in_the_summary(toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make) -> None:
    failed = Failure(phase=1, model="m", task="t", configuration=None, status="failed", problem="a trial")
    outcome = run_benchmarks([toy_unit], make_settings(max_requests=1), failures=[failed], in_process=True)
    assert outcome.failures == [failed] and len(outcome.results) == 3
    outcome = run_benchmarks([], make_settings(), failures=[failed], in_process=True)
    assert outcome.failures == [failed] and outcome.results == []


def test_nothing_to_do_and_bad_models_are_user_errors(toy_unit: BenchmarkUnit, make_settings: Make) -> None:
    settings = make_settings()
    with pytest.raises(UserError, match="nothing to benchmark"):
        run_benchmarks([], settings)
    with pytest.raises(UserError, match="no folder"):
        run_benchmarks([replace(toy_unit, model="./no/such/model")], settings)
    assert not settings.benchmark_results_dir.exists()  # nothing was written


# -- interruption ----------------------------------------------------------------------------------------------------


def test_one_interrupt_finishes_the_sample_in_work_and_writes_what_is_there(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    assert threading.current_thread() is threading.main_thread()
    real, before = worker.answer_sample, signal.getsignal(signal.SIGINT)

    def interrupt(request: Any, *rest: Any) -> SampleLine:
        if request.sample.sample_id == "toy/count:1":
            os.kill(os.getpid(), signal.SIGINT)
        return real(request, *rest)

    monkeypatch.setattr(worker, "answer_sample", interrupt)
    settings = make_settings()
    outcome = run_benchmarks([toy_unit], settings, in_process=True)
    assert outcome.interrupted and outcome.interrupted
    assert statuses(settings, toy_unit) == ["ok", "ok", "missing", "missing"]
    assert "the same command resumes" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(worker, "answer_sample", real)
    outcome = run_benchmarks([toy_unit], settings, in_process=True)
    assert not outcome.interrupted and statuses(settings, toy_unit) == ["ok"] * 4


# -- the machine -----------------------------------------------------------------------------------------------------


def test_the_old_model_is_gone_before_the_next_one_comes(
    tiny_model: str,
    toy_unit: BenchmarkUnit,
    toy_task: ToyTask,
    make_settings: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import sparse_attention_hub.models as models

    second = str(save_tiny_model(tmp_path / "second", seed=1))
    real, alive = models.load_model, []
    loaded: list[weakref.ref[Any]] = []

    def load(model_id: str, **options: Any) -> Any:
        gc.collect()
        alive.append(sum(ref() is not None for ref in loaded))
        lm = real(model_id, **options)
        loaded.append(weakref.ref(lm.model))
        return lm

    monkeypatch.setattr(models, "load_model", load)
    outcome = run_benchmarks([toy_unit, replace(toy_unit, model=second)], make_settings(), in_process=True)
    assert outcome.failures == [] and alive == [0, 0]  # loaded once each, one at a time


def test_slots_follow_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import benchmark.workers.pools as pools

    monkeypatch.setattr(pools, "usable_cores", lambda: 8)
    monkeypatch.setattr(pools, "visible_gpus", lambda: [])
    assert [slot.threads for slot in plan_slots("auto", None)] == [2, 2, 2, 2]
    assert [slot.threads for slot in plan_slots("cpu", 2)] == [4, 4]
    monkeypatch.setattr(pools, "visible_gpus", lambda: ["2", "5", "7"])
    slots = plan_slots("auto", None)
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["2", "5", "7"]
    assert [slot.device for slot in plan_slots("auto", 2)] == ["cuda", "cuda"]
    monkeypatch.setattr(pools, "visible_gpus", lambda: [str(i) for i in range(8)])
    wishes = [("auto", None), ("cuda", 3), ("cuda", 9), ("cpu", None)]
    assert [len(plan_slots(device, limit)) for device, limit in wishes] == [8, 3, 8, 4]
    assert [slot.device for slot in plan_slots("cpu", None)] == ["cpu"] * 4
    assert [(slot.device, slot.env) for slot in plan_slots("sharded", None)] == [("sharded", {})]


def test_importing_phase_2_imports_nothing_heavy() -> None:
    code = (
        "import sys, benchmark.execution.runner\n"
        "heavy = {'torch', 'transformers', 'ray', 'pebble', 'optuna', 'pandas', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_pebble_it_runs_in_this_process(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "has_pebble", lambda: False)
    monkeypatch.setitem(sys.modules, "pebble", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = run_benchmarks([toy_unit], make_settings(max_requests=1))
    assert outcome.failures == [] and outcome.results[0].samples.ok == 1


# -- real processes --------------------------------------------------------------------------------------------------


def _batch(unit: BenchmarkUnit, settings: Settings, folder: Path) -> Batch:
    run = UnitRun(unit, settings, "cpu")
    run.prepare(load_tokenizer(unit.model))
    return Batch(
        unit.model,
        unit.task,
        False,
        run.configs,
        tuple(run.missing()),
        settings,
        "cpu",
        journal=folder / "journal.jsonl",
        status=folder / "status.json",
    )


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.timeout(240)
def test_worker_processes_time_out_die_and_are_replaced(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, tmp_path: Path
) -> None:
    """One pool through all that happens to a worker: a time limit that kills, a SIGKILL, and the stop at the end."""
    toy_task.total = 400
    settings = make_settings(max_requests=400)
    batch, journal = _batch(toy_unit, settings, tmp_path), tmp_path / "journal.jsonl"
    pools = ProcessPools([Slot("worker-0", "cpu", 1)], None)
    try:
        future = pools.submit(0, batch, timeout=1.5)  # counted from when the worker is up
        (first,) = pools.pids()
        with pytest.raises(TimeoutError):
            future.result(timeout=120)
        pools.renew(0)
        assert not _is_alive(first)

        journal.unlink(missing_ok=True)
        future = pools.submit(0, batch, timeout=None)
        while not journal.exists():
            time.sleep(0.05)
        (second,) = pools.pids()
        os.kill(second, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="SIGKILL"):
            future.result(timeout=60)
        pools.renew(0)

        small = replace(batch, requests=batch.requests[:1], journal=tmp_path / "small.jsonl")
        assert pools.submit(0, small, timeout=60).result(timeout=120) == 1
        assert len(Journal(tmp_path / "small.jsonl").read()) == 1
        last = pools.pids()
    finally:
        pools.kill()
    assert last and not any(_is_alive(pid) for pid in last)


@pytest.mark.timeout(240)
def test_the_same_jobs_run_as_ray_actors_and_survive_a_kill(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = make_settings(max_requests=8, benchmark_results_dir=tmp_path / "calm")
    run_benchmarks([toy_unit], calm, in_process=True)

    from benchmark.workers.ray_pool import RayPool

    killed: list[int] = []
    watch = execution._Run._watch

    def kill_one(self: Any) -> None:
        watch(self)
        if not killed and isinstance(self.pool, RayPool) and list(self.base.rglob("actor-*.jsonl")):
            actor = next(iter(self.pool._actors.values()))
            killed.append(self.pool._ray.get(actor.pid.remote()))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(execution._Run, "_watch", kill_one)
    settings = make_settings(max_requests=8, ray_address="local", max_concurrent_benchmarks=2)
    outcome = run_benchmarks([toy_unit], settings)
    assert killed and outcome.failures == []
    assert _answers(settings.benchmark_results_dir) == _answers(tmp_path / "calm")


def _answers(base: Path) -> list[list[str]]:
    files = {name: rows for name, rows in result_files(base).items() if name.endswith("raw_results.csv")}
    return [[row["predicted_answer"] for row in rows] for _, rows in sorted(files.items())]


def test_a_batch_journals_each_sample_at_once(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, make_settings: Make, tmp_path: Path
) -> None:
    batch = _batch(toy_unit, make_settings(), tmp_path)
    counts: list[int] = []
    batch.run(lambda: counts.append(len(Journal(batch.journal).read())))  # type: ignore[arg-type]
    assert counts == [1, 2, 3, 4]
    shutil.rmtree(tmp_path, ignore_errors=True)
