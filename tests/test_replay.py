"""Traces and replay on a tiny model: equal to evaluating each configuration alone, and to what a real run does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "models"))

from tiny_models import Letters, build, forced

from sparse_attention_hub import (
    AdaptiveSamplingMaskerConfig,
    LocalMaskerConfig,
    Mask,
    Masker,
    MaskerConfig,
    OracleTopKConfig,
    OracleTopPMaskerConfig,
    PQCacheConfig,
    QuestTopKMaskerConfig,
    RandomSamplingMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
    dense_attention,
    register_masker,
)
from sparse_attention_hub.attention import AttentionResult
from sparse_attention_hub.maskers.shared_states import SharedStates
from sparse_attention_hub.maskers.state import MaskerState
from sparse_attention_hub.micro_metrics import MetricRecorder
from sparse_attention_hub.models import LanguageModel, answer, prefill
from sparse_attention_hub.models.trace import HeldLayers, Trace, TraceLayer, record_trace
from sparse_attention_hub.replay import replay, spread

CONTEXT = [1, *torch.randint(2, 100, (150,), generator=torch.Generator().manual_seed(3)).tolist()]
QUESTION = [5, 9, 44, 17, 23]


class EveryThirdConfig(MaskerConfig):
    """A user's masker: shares nothing with others."""


@register_masker(EveryThirdConfig)
class EveryThird(Masker[EveryThirdConfig]):
    def select(self, inputs, mask):  # type: ignore[no-untyped-def]
        every = (inputs.key_positions % 3 == 0)[:, None, None] & inputs.allowed
        return mask.union(Mask.from_dense(every, inputs.shape[1], inputs.kv_heads))


def attention(*maskers: MaskerConfig) -> ResearchAttention:
    return ResearchAttention(ResearchAttentionConfig([SinkMaskerConfig(2), LocalMaskerConfig(0.05), *maskers]))


def attentions() -> list[ResearchAttention]:
    return [
        attention(),
        *(attention(OracleTopKConfig(size)) for size in (1, 0.05, 0.2, 0.9)),
        attention(OracleTopPMaskerConfig(0.7)),
        attention(RandomSamplingMaskerConfig(0.2)),
        attention(OracleTopKConfig(0.05), AdaptiveSamplingMaskerConfig(0.1, 0.2, 0.2, 0, 0)),
        attention(EveryThirdConfig()),
    ]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.wrap(build("llama"), Letters(), name="tiny")


@pytest.fixture(scope="module")
def trace(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return record_trace(lm, CONTEXT, QUESTION, 6, tmp_path_factory.mktemp("traces") / "t")


def test_a_trace_holds_the_dense_run(lm: LanguageModel, trace: Trace) -> None:
    reply = answer(lm, prefill(lm, CONTEXT, 20), QUESTION, None, 6)
    assert trace.answer_ids == reply.token_ids
    assert trace.rows == len(QUESTION) + len(reply.token_ids) - 1
    for layer_idx in trace.layers:
        layer = trace.layer(layer_idx)
        assert layer.keys.shape[2] == len(CONTEXT) + trace.rows
        dense = dense_attention(layer.queries, layer.keys, layer.values, scaling=layer.scaling)
        torch.testing.assert_close(layer.dense, dense)


def test_recording_stops_at_eos(lm: LanguageModel, trace: Trace, tmp_path: Path) -> None:
    second = trace.answer_ids[1]
    stopping = LanguageModel.wrap(lm.model, lm.tokenizer, name="tiny")
    object.__setattr__(stopping, "eos_token_ids", frozenset({second}))
    short = record_trace(stopping, CONTEXT, QUESTION, 6, tmp_path / "t")
    ends = trace.answer_ids.index(second)
    assert short.answer_ids == trace.answer_ids[: ends + 1] and short.rows == len(QUESTION) + ends


@pytest.mark.parametrize("rows", [None, 4])
def test_together_equals_alone_equals_the_definition(trace: Trace, rows: int | None) -> None:
    kept = None if rows is None else spread(trace.rows, rows)
    together = replay(trace, attentions(), rows=kept, seed=7)
    for entry, shared in zip(attentions(), together, strict=True):
        (alone,) = replay(trace, [entry], rows=kept, seed=7)
        assert alone.error == pytest.approx(shared.error, abs=1e-6)
        assert alone.density == pytest.approx(shared.density, abs=1e-6)
        errors, densities = [], []
        for layer_idx in trace.layers:
            layer = trace.layer(layer_idx)
            queries, mask = layer.queries, None
            if kept is not None:
                queries = queries[:, :, kept]
                last = torch.tensor(kept) + layer.keys.shape[2] - trace.rows
                mask = (torch.arange(layer.keys.shape[2]) <= last[:, None])[None, None]
            state = entry.new_state()
            entry.prepare(layer.keys[:, :, : trace.context_length], layer_idx, state)
            result = entry(queries, layer.keys, layer.values, mask, layer.scaling, layer_idx, state, seeds=7)
            errors.append(result.error_rows().mean())
            densities.append(result.density)
        assert shared.error == pytest.approx(float(torch.stack(errors).mean()), abs=2e-6)
        assert shared.density == pytest.approx(sum(densities) / len(densities), abs=1e-6)


def test_states_are_shared_between_calls_and_bounded(trace: Trace) -> None:
    states = SharedStates(limit_bytes=0)
    first = replay(trace, attentions(), states=states)
    assert [r.error for r in replay(trace, attentions(), states=states)] == [r.error for r in first]


def test_layers_stay_on_the_device_between_replays(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    real, read = Trace.layer, []

    def count(self: Trace, layer_idx: int, device: torch.device | str = "cpu") -> TraceLayer:
        read.append(layer_idx)
        return real(self, layer_idx, device)

    monkeypatch.setattr(Trace, "layer", count)
    plain = replay(trace, attentions()[:3], seed=7)
    one_layer = max(file.stat().st_size for file in trace.folder.glob("*.safetensors"))
    for room, later in ((10 * one_layer, []), (2 * one_layer, trace.layers[2:]), (0, trace.layers)):
        held = HeldLayers(room)
        for expected in (trace.layers, later, later):  # the same layers again, not the latest ones
            read.clear()
            found = replay(trace, attentions()[:3], seed=7, held=held)
            assert read == expected
            assert [(r.error, r.density) for r in found] == [(r.error, r.density) for r in plain]


def test_states_hold_nothing_for_maskers_that_learn_nothing(trace: Trace) -> None:
    """A search asks for hundreds of configurations: what it keeps of each, and walks through, would grow with them."""
    states = SharedStates()
    replay(trace, [attention(OracleTopKConfig(0.01 * percent)) for percent in range(1, 9)], states=states)
    assert not states._held
    replay(trace, [attention(QuestTopKMaskerConfig(0.1, page_size=4))] * 2, states=states)
    assert len(states._held) == len(trace.layers)


def test_states_are_trimmed_by_what_was_used_since(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    quest = [attention(QuestTopKMaskerConfig(0.1, page_size=size)) for size in (4, 8, 16)]
    states = SharedStates()
    replay(trace, quest, states=states)
    held = sum(state.bytes() for state in states._held.values())
    assert states._total == held > 0
    asked: list[object] = []
    size = MaskerState.bytes
    monkeypatch.setattr(MaskerState, "bytes", lambda self: asked.append(self) or size(self))
    replay(trace, quest[:1], states=states)
    assert len(asked) == len(trace.layers)
    states._limit = held // 2
    states.trim()
    assert 0 < states._total <= held // 2
    states.forget(trace.key)
    assert not states._held and states._total == 0


def test_what_replay_learned_of_a_context_serves_the_model_too(
    lm: LanguageModel, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = attention(
        PQCacheConfig(heavy_size=0.1, pq_group_factor=4, pq_bits=3, kmeans_iter=4, init_offset=2, metric="euclidean")
    )
    alone = trace.prefilled(lm, 20)
    assert alone is not None
    expected = forced(lm, alone, QUESTION, trace.answer_ids, way)
    states = SharedStates()
    replayed = replay(trace, [way], states=states)
    monkeypatch.setattr(type(way.maskers[2]), "fit", lambda *_: pytest.fail("fitted again"))
    prefilled = trace.prefilled(lm, 20, states)
    assert prefilled is not None
    assert forced(lm, prefilled, QUESTION, trace.answer_ids, way) == expected
    assert [r.error for r in replay(trace, [way], states=states)] == [r.error for r in replayed]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_of_narrow_dtypes_are_not_those_of_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    """With all keys, what is left is the rounding of sums in float32: about 5e-7. That of outputs in bfloat16 is 1.7e-3."""
    narrow = LanguageModel.wrap(build("llama").to(dtype), Letters(), name="narrow")
    ways = [
        ResearchAttention(ResearchAttentionConfig(entries))
        for entries in ([], [SinkMaskerConfig(1.0)], [OracleTopKConfig(1.0)])
    ]
    trace = record_trace(narrow, CONTEXT, QUESTION, 5, tmp_path / "trace")
    found = [result.error for result in replay(trace, ways)]
    for way in ways:
        recorder, errors = MetricRecorder("full"), []

        def look(*, result: AttentionResult, errors: list[float] = errors, **_: object) -> None:
            errors.append(float(result.error_rows().max()))
            assert result.output.dtype == dtype

        for seen in (recorder, look):
            forced(narrow, prefill(narrow, CONTEXT, 40), QUESTION, trace.answer_ids, way, recorder=seen, stepwise=True)
        assert recorder.error is not None
        found += [recorder.error, *errors]
    assert 0 < max(found) < 3e-6


def test_one_layer_of_replay_is_what_a_forced_forward_does_first(lm: LanguageModel, trace: Trace) -> None:
    """In the first layer nothing has compounded yet: replay and the real sparse run see the same inputs."""
    entry = attention(OracleTopKConfig(0.1))
    asked = len(QUESTION)
    passes = [range(asked), range(asked, trace.rows)]  # a fraction of N is of what the last row of a pass sees
    replayed = [replay(trace, [entry], layers=[0], rows=rows)[0].error for rows in passes]
    seen: list[float] = []

    def recorder(*, layer_idx: int, result, **_: object) -> None:  # type: ignore[no-untyped-def]
        if layer_idx == 0:
            seen.append(float(result.error_rows().mean()))

    forced(lm, prefill(lm, CONTEXT, 20), QUESTION, trace.answer_ids, entry, recorder=recorder)
    assert seen == pytest.approx(replayed, abs=1e-5)


def test_a_cache_rebuilt_from_a_trace_answers_alike(lm: LanguageModel, trace: Trace) -> None:
    prefilled = trace.prefilled(lm, 20)
    assert prefilled is not None
    assert answer(lm, prefilled, QUESTION, None, 6).token_ids == trace.answer_ids


def test_thinned_traces_keep_even_layers(lm: LanguageModel, tmp_path: Path) -> None:
    assert spread(30, 4) == [0, 10, 19, 29] and spread(4, 9) == [0, 1, 2, 3]
    thin = record_trace(lm, CONTEXT, QUESTION, 3, tmp_path / "t", layers=[0, 3])
    assert thin.layers == [0, 3] and thin.prefilled(lm, 20) is None
    assert replay(thin, [attention()])[0].errors.shape[0] == 2


def test_damage_is_noticed(lm: LanguageModel, tmp_path: Path) -> None:
    made = record_trace(lm, CONTEXT, QUESTION, 3, tmp_path / "t")
    assert Trace.open(tmp_path / "t") is not None and Trace.open(tmp_path / "absent") is None
    path = tmp_path / "t" / "layer_001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert Trace.open(tmp_path / "t") is None
    meta = tmp_path / "t" / "trace.json"
    meta.write_text(json.dumps({**made.meta, "format": 0}))
    assert Trace.open(tmp_path / "t") is None


def test_under_decode_only_answer_rows_are_recorded(lm: LanguageModel, tmp_path: Path) -> None:
    made = record_trace(lm, CONTEXT, QUESTION, 4, tmp_path / "t", sparse_from="decode")
    assert made.rows == len(made.answer_ids) - 1
    assert replay(made, [attention()])[0].error > 0
