"""Journals with a damaged line. In Phase 2 it counts as not written, or it is legal; a search names it, or it is legal. Never a
traceback, never a score of what was not answered."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmark.execution.jobs import AnswerStore, BenchmarkUnit, UnitRun
from benchmark.execution.output import write_unit
from benchmark.execution.runner import run_benchmarks
from benchmark.execution.worker import forget_model
from benchmark.settings import Settings
from benchmark.speed.toy import save_tiny_model
from benchmark.storage.tables import read_table
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.models import load_tokenizer
from tests.report.test_damaged_files import damaged_texts
from tests.search.test_study import FormulaEvaluator, make_study, run
from tests.toy import ToyTask, toy_configs

Answered = tuple[BenchmarkUnit, Settings, Any]
DAMAGE = ("missing", "null", "wrong type", "huge", "NaN", "deep")


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Answered:
    """Two samples, answered under dense attention and a sparse configuration; settings that score them again."""
    base = tmp_path_factory.mktemp("journals")
    model = str(save_tiny_model(base / "tiny-llama"))
    settings = Settings(
        (model,), ("toy/count",), device="cpu", max_new_tokens=2, max_requests=2, max_context_length=512,
        benchmark_results_dir=base / "out",
    )  # fmt: skip
    unit = BenchmarkUnit(model, "toy/count", tuple(toy_configs()[:2]), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmark.execution.jobs.get_task", lambda name: ToyTask())
        run_benchmarks([unit], settings, in_process=True)
    forget_model()
    return unit, replace(settings, rescore=True), load_tokenizer(model)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_of_phase_2(damage: str, answered: Answered, toy_task: ToyTask, monkeypatch: pytest.MonkeyPatch) -> None:
    unit, settings, tokenizer = answered
    (path,) = settings.benchmark_results_dir.glob("*/.journals/*/*.jsonl")
    whole = path.read_bytes()
    first, second = whole.splitlines(keepends=True)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # hundreds of small files
    line = json.loads(first)
    line["answers"].pop(next(iter(line["answers"])))  # the fields of an answer are those of the other one
    legal = []
    try:
        for where, _, text in damaged_texts(line, damage):
            path.write_bytes(text.encode() + b"\n" + second)
            store = AnswerStore(path.parent)
            store.poll()
            if len(store.lines) == 2:
                legal.append(where)
                rescored(unit, settings, tokenizer)
    finally:
        path.write_bytes(whole)
    assert not legal or damage in ("missing", "null", "huge")


def rescored(unit: BenchmarkUnit, settings: Settings, tokenizer: Any) -> None:
    """Scores what is journalled. Every answer that counts is a text, every figure that is there a number."""
    scoring = UnitRun(unit, settings, "cpu")
    try:
        scoring.prepare(tokenizer)
    except UserError as error:
        assert "\n" not in str(error)
        return
    for row in write_unit(scoring, None).rows:
        table = read_table(settings.benchmark_results_dir / Path(row.folder) / "raw_results.csv")
        counted = [line for line in table if line["status"] == "ok"]
        assert len(counted) == row.samples.ok and row.samples.ok + row.samples.failed + row.samples.missing == 2
        assert all(line["overlap"] and line["predicted_answer"] for line in counted)
        assert (row.score is None) == (not counted)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("number", [0, -1], ids=["replay", "generation"])
def test_a_damaged_line_of_a_search(number: int, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    whole = run(make_study(path, FormulaEvaluator(), (10,), num_samples=6)).best()
    lines = path.read_text().splitlines(keepends=True)
    named = 0
    for where, _, text in damaged_texts(json.loads(lines[number]), damage):
        path.write_text("".join([*lines[:number], text + "\n", *(lines[number + 1 :] if number == 0 else [])]))
        try:
            study = run(make_study(path, FormulaEvaluator(), (10,), num_samples=6))
        except UserError as error:
            named += 1
            assert str(error).startswith(f"{path}, line ") and f"field {where[0]}" in str(error) and "\n" not in str(error)
            continue
        assert len(study.best()) == len(whole) and damage != "NaN"
        figures = [study.trials[found.trial].last for found in study.best()]
        assert all(math.isfinite(found.error or 0.0) and math.isfinite(found.density) for found in figures)
    assert named > 5
