"""Micro metrics: what is recorded, what it costs, and that records stay bounded and fair."""

from __future__ import annotations

from datetime import datetime

import pytest
import torch
from torch import Tensor

from sparse_attention_hub import LocalMaskerConfig, ResearchAttention, ResearchAttentionConfig, SinkMaskerConfig
from sparse_attention_hub.attention import AttentionResult
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.micro_metrics import MAX_CALLS, MetricRecorder, expand_records

ATTENTION = ResearchAttention(ResearchAttentionConfig([SinkMaskerConfig(sink_size=2), LocalMaskerConfig(window_size=3)]))


def call(recorder: MetricRecorder, layer: int, step: int, rows: int, total: int) -> AttentionResult:
    generator = torch.Generator().manual_seed(1000 * layer + step)
    queries = torch.randn(1, 4, rows, 8, generator=generator)
    keys, values = torch.randn(1, 2, total, 8, generator=generator), torch.randn(1, 2, total, 8, generator=generator)
    scaling = 8**-0.5
    result = ATTENTION(queries, keys, values, scaling=scaling, layer_idx=layer)
    recorder(layer_idx=layer, result=result, queries=queries, keys=keys, values=values, scaling=scaling, step=step)
    return result


def test_full_mode_measures_every_row_of_every_call() -> None:
    recorder = MetricRecorder("full")
    question = [call(recorder, layer, 0, rows=6, total=20) for layer in range(3)]
    token = [call(recorder, layer, 1, rows=1, total=21) for layer in range(3)]

    def flat_mean(values: list[Tensor]) -> float:
        return float(torch.cat([value.flatten() for value in values]).mean())

    assert recorder.error == pytest.approx(flat_mean([r.error_rows() for r in question + token]), rel=1e-5)
    assert recorder.density == pytest.approx(flat_mean([r.density_rows for r in question + token]), rel=1e-5)
    assert len(recorder.calls()) == 6


def test_sample_mode_takes_rows_of_every_layer_and_position_alike() -> None:
    recorder = MetricRecorder("sample")
    taken: set[tuple[int, int]] = set()
    for step, total in enumerate(range(40, 40 + 64)):
        for layer in range(8):
            before = len(recorder.calls())
            call(recorder, layer, step, rows=1, total=total)
            if len(recorder.calls()) > before:
                taken.add((layer, total % 8))
    assert len(recorder.calls()) == 64  # an eighth of 512
    assert {layer for layer, _ in taken} == set(range(8))
    assert {position for _, position in taken} == set(range(8))


def test_sampled_error_is_that_of_the_rows_taken() -> None:
    recorder = MetricRecorder("sample")
    result = call(recorder, layer=3, step=0, rows=24, total=50)
    rows = [row for row in range(24) if (50 - 24 + row + 3) % 8 == 0]
    assert recorder.error == pytest.approx(float(result.error_rows()[:, :, rows].mean()), rel=1e-5)
    assert recorder.density == pytest.approx(result.density)


def test_off_computes_no_second_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    import sparse_attention_hub.attention as attention

    def never(*_: object) -> None:
        raise AssertionError("dense attention was computed")

    monkeypatch.setattr(attention, "dense_attention", never)
    recorder = MetricRecorder("off")
    call(recorder, 0, 0, rows=8, total=16)
    assert recorder.error is None and recorder.calls() == []


def test_a_dense_row_is_not_recorded() -> None:
    recorder = MetricRecorder("full")
    empty = torch.zeros(1, 1, 1, 1)
    recorder(layer_idx=0, result=None, queries=empty, keys=empty, values=empty, scaling=1.0, step=0)
    assert recorder.error is None and recorder.density is None and recorder.calls() == []


def test_records_are_bounded_and_cover_the_whole_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAX_CALLS, "full", 16)
    recorder = MetricRecorder("full")
    for step in range(100):
        call(recorder, 0, step, rows=1, total=20 + step)
    steps = [entry[1] for entry in recorder.calls()]
    assert 8 <= len(steps) <= 16
    assert steps[0] == 0 and steps[-1] >= 88  # not only the first ones
    assert recorder.error is not None


def test_density_and_error_come_from_the_same_calls() -> None:
    recorder = MetricRecorder("sample")
    for step in range(30):
        call(recorder, 0, step, rows=1, total=20 + step)
    assert recorder.calls() and all(None not in entry for entry in recorder.calls())


def test_record_schema() -> None:
    recorder = MetricRecorder("full")
    call(recorder, layer=2, step=5, rows=1, total=20)
    records = list(expand_records(recorder.calls(), "ruler/1024/vt:17"))
    assert [record["metric"] for record in records] == [
        "research_attention_density",
        "research_attention_output_error",
        "research_attention_kv_fraction",
    ]
    for record in records:
        assert set(record) == {"timestamp", "metric", "value", "metadata", "location", "sample", "step"}
        assert record["metadata"] == {"layer_idx": 2} and record["step"] == 5
        assert record["sample"] == "ruler/1024/vt:17" and isinstance(record["value"], float)
        moment = datetime.fromisoformat(record["timestamp"])
        assert moment.tzinfo is not None and moment.utcoffset().total_seconds() == 0  # type: ignore[union-attr]


def test_bad_modes_are_refused() -> None:
    with pytest.raises(UserError, match="off, sample or full, got 'all'"):
        MetricRecorder("all")  # type: ignore[arg-type]


def test_long_questions_are_measured_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    import sparse_attention_hub.maskers.call_parts as module

    whole, parts = MetricRecorder("full"), MetricRecorder("full")
    call(whole, 0, 0, rows=20, total=60)
    monkeypatch.setitem(module.BLOCK_SCORES, "cpu", 4 * 60 * 3)
    call(parts, 0, 0, rows=20, total=60)
    assert parts.error == pytest.approx(whole.error, rel=1e-6)
