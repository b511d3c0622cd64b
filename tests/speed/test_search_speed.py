"""The scripts that measure Phase 1, on a tiny model: their records, and the figures that must not depend on speed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from benchmark.speed import search_fidelity, search_quality, search_speed
from benchmark.speed.search_setup import random_configs

TINY = ("--task", "ruler/1024/niah_single_1", "--length", "1024", "--requests", "1", "--json")


def record_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert set(record) == {"figures", "goals", "machine"}
    for goal in record["goals"]:
        assert set(goal) in ({"name", "value", "at_least", "holds"}, {"name", "value", "at_most", "holds"})
        assert goal["value"] == pytest.approx(record["figures"][goal["name"]], rel=1e-3)
    return record


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts run here: new processes would each import torch again."""

    def run(part: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
        before = time.process_time()
        return part(*arguments), time.process_time() - before

    monkeypatch.setattr(search_speed, "in_process", run)


def test_search_speed(tiny_model: str, same_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    search_speed.main(["--model", tiny_model, *TINY, "--tokens", "3", "--families", "oracle_top_k", "--trials", "8"])
    figures = record_of(capsys)["figures"]
    assert {"oracle_top_k_our_prefill_s", "capture_a_request_s", "oracle_top_k_full_replay_ratio", "search_8_ratio"} <= set(
        figures
    )
    assert figures["search_8_trials"] == 8 and all(value >= 0 for value in figures.values())
    # The first layer sees the same inputs on both sides, the second nearly so.
    assert figures["oracle_top_k_replayed_error"] == pytest.approx(figures["oracle_top_k_baseline_error"], rel=0.3)


def test_search_fidelity(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--families", "oracle_top_k", "random_sampling", "--configs", "4", "--tokens", "3", "--pool", "3"]
    search_fidelity.main(["--model", tiny_model, *TINY, *arguments])
    record = record_of(capsys)
    assert {"oracle_top_k_forced_ordered", "random_sampling_regret", "right", "dense_right_1024"} <= set(record["figures"])
    assert all(0 <= record["figures"][f"{name}_reproduced"] <= 1 for name in ("oracle_top_k", "random_sampling"))


def test_the_requests_that_dense_attention_answers_best() -> None:
    scores = [0.0, 1.0, 0.5, 0.5, None, 0.5]
    task = SimpleNamespace(metric="m", score=lambda text, sample: {"m": scores[sample]})
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "")
    evaluator = SimpleNamespace(task=task, lm=SimpleNamespace(tokenizer=tokenizer))
    evaluator.samples = [SimpleNamespace(sample=place) for place in range(6)]
    evaluator.traces = [SimpleNamespace(answer_ids=[place]) for place in range(6)]
    assert search_fidelity.answered_best(evaluator, 3) == pytest.approx(2 / 3)
    assert [entry.sample for entry in evaluator.samples] == [1, 2, 3]
    assert [trace.answer_ids for trace in evaluator.traces] == [[1], [2], [3]]


def test_search_quality(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--combinations", "oracle_top_k", "--seeds", "1", "--num-samples", "8"]
    search_quality.main(["--model", tiny_model, *TINY, *arguments])
    figures = record_of(capsys)["figures"]
    assert figures["oracle_top_k_seed_0_trials"] > 8
    assert all(figures[f"{sampler}_over_single"] > 0 for sampler in ("tpe", "nsga2"))


def test_order_and_regret_by_hand() -> None:
    def outcome(replayed: float, forced: float, density: float = 0.04) -> search_fidelity.Outcome:
        return search_fidelity.Outcome(replayed, density, forced)

    # 0.10 and 0.11 are too near to count; of the two pairs with 0.2 one is ordered the other way round.
    found = [outcome(0.3, 0.10), outcome(0.1, 0.11), outcome(0.2, 0.2)]
    assert search_fidelity.ordered_alike(found, "forced") == [False, True]
    assert search_fidelity.regret(found, 1) == pytest.approx(0.1)
    assert search_fidelity.regret(found, 3) == 0.0
    assert search_fidelity.regret([outcome(0.1, 0.2, density=0.9)], 1) == 0.0


def test_the_same_configurations_on_both_sides() -> None:
    for family in ("oracle_top_k", "adaptive_sampling"):
        first = random_configs(family, 3, seed=7)
        assert random_configs(family, 3, seed=7) == first
        assert random_configs(family, 2, seed=7) == first[:2]
