"""Reasoning models: what follows their thinking is scored, and an answer that never leaves it is counted."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import benchmark.execution.worker as worker
import sparse_attention_hub.models as models
from benchmark.execution.runner import BenchmarkUnit, run_benchmarks
from benchmark.raytune.plan import template_notes
from benchmark.settings import Settings
from benchmark.storage.results import safe_name
from sparse_attention_hub.models import load_tokenizer
from sparse_attention_hub.models.prompts import render_chat
from tests.toy import ToyTask

Make = Callable[..., Settings]
TEMPLATE = "U {{ messages[0].content }} A {% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"


@pytest.fixture
def ask(
    toy_unit: BenchmarkUnit, toy_task: ToyTask, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Settings, str, list[str]], Any]:
    """Runs dense attention with this template; the answers to its samples are these texts."""
    toy_task.use_chat_template = True
    load, answer = worker._load, models.answer_many

    def run(settings: Settings, template: str, texts: list[str]) -> Any:
        tokenizer, given = load_tokenizer(toy_unit.model), itertools.cycle(texts)
        tokenizer.chat_template = template

        def with_template(batch: Any) -> Any:
            loaded = load(batch)
            loaded.lm = replace(loaded.lm, tokenizer=tokenizer)
            return loaded

        monkeypatch.setattr(worker, "_load", with_template)
        monkeypatch.setattr(
            models, "answer_many", lambda *a, **k: [replace(found, text=next(given)) for found in answer(*a, **k)]
        )
        unit = replace(toy_unit, configs=toy_unit.configs[:1])
        outcome = run_benchmarks([unit], settings, in_process=True, tokenizers={unit.model: tokenizer})
        worker.forget_model()
        folder = settings.benchmark_results_dir / safe_name(unit.model) / "dense" / "toy_count"
        with (folder / "raw_results.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        records = [json.loads((folder / name).read_text()) for name in ("metrics.json", "config.json")]
        return outcome, rows, *records

    return run


def test_what_follows_the_thinking_is_scored(ask: Any, toy_task: ToyTask, make_settings: Make) -> None:
    texts = ["7", "<think>abc</think>\n\n7", "<think>abcdefgh", "abc</think>7"]
    _, rows, metrics, config = ask(make_settings(), TEMPLATE, texts)
    assert [row["predicted_answer"] for row in rows] == texts
    assert [float(row["length"]) for row in rows] == [0.1, 0.1, 0.0, 0.1]
    assert metrics["samples"]["never_left_thinking"] == 1 and metrics["samples"]["ok"] == 4
    assert config["thinking"] == "auto" and "thinking" not in config["settings"]


def test_a_template_may_open_the_thinking(ask: Any, toy_task: ToyTask, make_settings: Make) -> None:
    _, rows, metrics, _ = ask(make_settings(), "U {{ messages[0].content }} A <think>\n", ["abc", "abc</think>7"])
    assert [float(row["length"]) for row in rows] == [0.0, 0.1, 0.0, 0.1]
    assert metrics["samples"]["never_left_thinking"] == 2


def test_thinking_is_recorded_and_part_of_the_identity_unless_auto(ask: Any, toy_task: ToyTask, make_settings: Make) -> None:
    settings = make_settings()
    _, _, metrics, auto = ask(settings, TEMPLATE, ["7"])
    assert "never_left_thinking" not in metrics["samples"]
    outcome, _, _, off = ask(replace(settings, thinking="off"), TEMPLATE, ["7"])
    assert any("thinking: auto -> off" in note for note in outcome.notes)
    assert off["thinking"] == off["settings"]["thinking"] == "off" and outcome.configuration.thinking == "off"
    _, _, _, on = ask(replace(settings, thinking="on"), TEMPLATE, ["7"])
    assert len({found["samples_hash"] for found in (auto, off, on)}) == 3
    outcome, _, _, again = ask(settings, TEMPLATE, ["8"])  # everything is reused
    assert again == auto and not any("thinking: " in note for note in outcome.notes)


def test_templates_that_ignore_it_are_noted_once(tiny_model: str, toy_task: ToyTask, make_settings: Make) -> None:
    tokenizer, settings = load_tokenizer(tiny_model), make_settings(thinking="on")
    tasks, plain = ["ruler/512/vt", "ruler/512/fwe"], make_settings()
    assert template_notes(plain, tasks, {"m": tokenizer}) == ["m has no chat template: prompts are plain text"]
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert template_notes(plain, tasks, {"m": tokenizer}) == []
    assert "no switch for thinking: --thinking on" in template_notes(settings, tasks, {"m": tokenizer})[0]
    tokenizer.chat_template = TEMPLATE
    assert template_notes(settings, tasks, {"m": tokenizer}) == [] and render_chat(tokenizer, "x") == "U x A "
