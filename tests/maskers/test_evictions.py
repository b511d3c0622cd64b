"""Evictions: a fixed set of the context's keys, whatever is asked later."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_attention_hub as hub
from sparse_attention_hub import AttentionInputs, ContextSummary, ResearchAttention, ResearchAttentionConfig
from sparse_attention_hub.maskers.base import MaskerConfig
from sparse_attention_hub.maskers.shared_states import SharedStates
from sparse_attention_hub.testing import MaskerContract

N, HEADS, KV_HEADS, DIM = 150, 8, 2, 16
CONFIGS = [
    hub.SnapKVConfig(0.2, window_size=6, kernel_size=3),
    hub.ExpectedAttentionConfig(0.2),
    hub.KeyDiffConfig(0.2),
    hub.KnormConfig(0.2),
    hub.H2OConfig(0.2),
    hub.TOVAConfig(0.2),
]
NAMES = [type(config).__name__ for config in CONFIGS]


class TestSnapKV(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return hub.SnapKVConfig(0.2, window_size=8)


class TestExpectedAttention(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return hub.ExpectedAttentionConfig(0.2)


class TestKeyDiff(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return hub.KeyDiffConfig(0.2)


class TestKnorm(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return hub.KnormConfig(0.2)


class TestH2O(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return hub.H2OConfig(0.2)


class TestTOVA(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return hub.TOVAConfig(0.2)


def tensors(n: int, seed: int = 0, rows: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, HEADS, n if rows is None else rows, DIM), (1, KV_HEADS, n, DIM), (1, KV_HEADS, n, DIM)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def attention(*configs: MaskerConfig) -> ResearchAttention:
    return ResearchAttention(ResearchAttentionConfig(list(configs)))


def seen(config: MaskerConfig, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """(attention, state that saw these tensors as a prefill)."""
    pipeline = attention(config)
    state = pipeline.new_state()
    state.observe(0, ContextSummary.of(AttentionInputs(q, k, v), pipeline.observes))
    pipeline.prepare(k, 0, state)
    return pipeline, state


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_the_set_is_fixed_when_the_context_ends(config: MaskerConfig) -> None:
    """30 of 150 keys per kv head, whatever the queries are; every later key; and a rewind brings the same set back."""
    pipeline, state = seen(config, *tensors(N))
    context, later = tensors(N)[1:], tensors(40, seed=1)
    k, v = (torch.cat(pair, 2) for pair in zip(context, later[1:], strict=True))
    sets = []
    for rows, end in ((1, N + 1), (5, N + 12), (1, N + 40), (1, N + 3)):
        queries = tensors(end, seed=end, rows=rows)[0]
        state.rewind(end - 1)
        p = pipeline(queries, k[:, :, :end], v[:, :, :end], state=state).mask.inclusion_probability()
        kept = p[:, :, -1, :N]
        assert bool((kept.sum(-1) == 30).all()) and bool((p[:, :, -1, N:] == 1).all())
        assert torch.equal(kept, kept[:, :: HEADS // KV_HEADS].repeat_interleave(HEADS // KV_HEADS, 1))
        assert bool((p[:, :, 0, : N + 1] == p[:, :, -1, : N + 1]).all()) if rows == 1 else True
        sets.append(kept)
    assert all(torch.equal(sets[0], other) for other in sets)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_evicted_keys_are_never_read(config: MaskerConfig) -> None:
    pipeline, state = seen(config, *tensors(N))
    (q, *_), (_, k, v) = tensors(N + 10, seed=3, rows=1), tensors(N)
    k, v = (torch.cat([part, torch.ones(1, KV_HEADS, 10, DIM)], 2) for part in (k, v))
    result = pipeline(q, k, v, state=state)
    assert result.kv_fraction == pytest.approx(40 / (N + 10))
    evicted = result.mask.inclusion_probability()[:, :: HEADS // KV_HEADS, 0] == 0
    for part in (k, v):
        part[evicted] = float("nan")
    assert pipeline(q, k, v, state=state).output.isfinite().all()


def test_sinks_and_windows_come_on_top_or_share_the_budget() -> None:
    """A key in both counts once: the fixed set does not depend on what other maskers chose."""
    q, k, v = tensors(N)
    pipeline = attention(hub.SinkMaskerConfig(4), hub.LocalMaskerConfig(4), hub.KnormConfig(20))
    state = pipeline.new_state()
    pipeline.prepare(k, 0, state)
    alone = attention(hub.KnormConfig(20))(q[:, :, -1:], k, v).mask.inclusion_probability()
    both = pipeline(q[:, :, -1:], k, v, state=state).mask.inclusion_probability()
    ends = torch.zeros(N, dtype=torch.bool)
    ends[:4] = ends[-4:] = True
    assert torch.equal(both == 1, (alone == 1) | ends)


def test_heavy_hitters_by_their_definition() -> None:
    """From the formula, in NumPy: softmax of every row over the keys it sees, its column means over those rows, mean over a group."""
    q, k, v = tensors(N, seed=5)
    pipeline, state = seen(hub.H2OConfig(25), q, k, v)
    order = state.entry(0, 0).fitted.order[0]
    queries, keys = q[0].double().numpy(), k[0].double().numpy()
    for kv_head in range(KV_HEADS):
        received = np.zeros(N)
        for head in range(kv_head * 4, kv_head * 4 + 4):
            for row in range(N):
                logits = keys[kv_head, : row + 1] @ queries[head, row] / np.sqrt(DIM)
                weights = np.exp(logits - logits.max())
                received[: row + 1] += weights / weights.sum()
        received /= np.arange(N, 0, -1)
        assert order[kv_head, :25].tolist() == np.argsort(-received, kind="stable")[:25].tolist()


@pytest.mark.parametrize("cut", [(150,), (1, 149), (60, 90), (3, 64, 2, 81)])
def test_parts_of_a_prefill_are_one_prefill(cut: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_attention_hub.maskers import call_parts

    q, k, v = tensors(N)
    whole = ContextSummary.of(AttentionInputs(q, k, v))
    monkeypatch.setitem(call_parts.BLOCK_SCORES, "cpu", 7 * HEADS * N)  # rows in blocks
    parts, end = ContextSummary(whole.parts), 0
    for size in cut:
        start, end = end, end + size
        parts.add(AttentionInputs(q[:, :, start:end], k[:, :, :end], v[:, :, :end]))
    assert parts.length == whole.length == N and parts.tensors().keys() == whole.tensors().keys()
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(parts.tensors()[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


def test_statistics_are_those_of_the_rows_after_the_sinks() -> None:
    q, k, v = tensors(N)
    summary = ContextSummary.of(AttentionInputs(q, k, v), ["statistics"])
    rows = q[0, 3, 4:].double()
    torch.testing.assert_close(summary.mean[0, 3].double(), rows.mean(0), atol=1e-5, rtol=1e-5)  # type: ignore[index]
    torch.testing.assert_close(summary.covariance()[0, 3].double(), torch.cov(rows.T, correction=0), atol=1e-4, rtol=1e-4)
    assert summary.queries is None and summary.received is None


def test_sinks_and_softcap_are_part_of_the_attention_that_is_seen() -> None:
    q, k, v = tensors(40)
    sinks = torch.linspace(-1, 2, HEADS)
    summary = ContextSummary.of(AttentionInputs(q, k, v, softcap=1.5, sinks=sinks))
    logits = 1.5 * torch.tanh(q @ k.repeat_interleave(4, 1).transpose(2, 3) * DIM**-0.5 / 1.5)
    logits = logits.masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), float("-inf"))
    weights = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(1, -1, 40, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(summary.last_attention(k, 5)[0], weights[:, :, -5:].mean(2))
    torch.testing.assert_close(summary.received, weights.view(1, KV_HEADS, 160, 40).sum(2))


def test_what_was_seen_after_the_context_counts_for_the_context_only() -> None:
    """As a dense question does: the last rows are the question's, the set is one of the context's keys."""
    q, k, v = tensors(N + 10)
    pipeline = attention(hub.SnapKVConfig(20, window_size=4, kernel_size=1))
    state = pipeline.new_state()
    state.observe(0, ContextSummary.of(AttentionInputs(q, k, v), pipeline.observes))
    pipeline.prepare(k[:, :, :N], 0, state)
    weights = AttentionInputs(q[:, :, -4:], k, v).scores().softmax(-1)[..., :N].mean(2).view(1, KV_HEADS, -1, N).mean(2)
    wanted = weights.topk(20).indices.sort().values
    p = pipeline(q[:, :, -1:], k, v, state=state).mask.inclusion_probability()[:, ::4, 0]
    assert torch.equal(p[..., :N].nonzero()[:, 2].view(1, KV_HEADS, 20), wanted) and bool((p[..., N:] == 1).all())


def test_without_a_prefill_the_first_call_is_the_observation() -> None:
    q, k, v = tensors(N)
    for config in CONFIGS:
        pipeline, state = seen(config, q, k, v)
        known = pipeline(q, k, v, state=state).mask.inclusion_probability()
        assert torch.equal(pipeline(q, k, v).mask.inclusion_probability(), known)
        unprepared = pipeline.new_state()
        assert torch.equal(pipeline(q, k, v, state=unprepared).mask.inclusion_probability(), known)
        more, values = (torch.cat([part, part[:, :, :5]], 2) for part in (k, v))
        after = pipeline(q[:, :, :5], more, values, state=unprepared).mask.inclusion_probability()
        assert torch.equal(after[:, :, -1, :N], known[:, :, -1])


def test_configurations_share_one_ranking() -> None:
    q, k, v = tensors(N)
    states, summary = SharedStates(), ContextSummary.of(AttentionInputs(q, k, v))
    sizes = [attention(hub.SnapKVConfig(size, window_size=8)).maskers for size in (0.1, 0.3, 40)]
    entries = [states.of(maskers, "context", k, 0, summary).entry(0, 0) for maskers in sizes]
    assert entries[0] is entries[1] is entries[2] and entries[0].bytes() == 4 * KV_HEADS * N
    other = attention(hub.SnapKVConfig(0.1, window_size=16)).maskers
    assert states.of(other, "context", k, 0, summary).entry(0, 0) is not entries[0]
    summary.question = (5, 6)  # what was seen has another question in it
    assert states.of(sizes[0], "context", k, 0, summary).entry(0, 0) is not entries[0]
    keys_alone = attention(hub.KnormConfig(0.1)).maskers
    assert states.of(keys_alone, "context", k, 0, summary).entry(0, 0) is states.of(keys_alone, "context", k, 0).entry(0, 0)


def test_a_rewind_below_the_context_forgets_what_was_seen() -> None:
    q, k, v = tensors(N)
    pipeline, state = seen(hub.TOVAConfig(10), q, k, v)
    state.rewind(N)
    assert state.entry(0, 0).is_fitted
    state.rewind(N - 1)
    assert not state.entry(0, 0).is_fitted and state.entry(0, 0).summary is None and state.entry(0, 1).summary is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heavy_size": 0}, "heavy_size must be > 0, got 0"),
        ({"window_size": 65}, r"window_size must be an integer in \[1, 64\], got 65"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
    ],
)
def test_bad_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hub.SnapKVConfig(**({"heavy_size": 64} | fields))


def test_right_padded_contexts_are_ranked_to_their_own_ends() -> None:
    """Each item keeps a tenth of its own context, whatever the other's length."""
    keys, lengths = torch.randn(2, 2, 200, 16), torch.tensor([50, 200])
    allowed = torch.arange(200) < lengths.unsqueeze(-1)
    way = attention(hub.KnormConfig(0.1))
    state = way.new_state()
    way.prepare(keys, 0, state, allowed)
    mask = torch.cat([allowed, torch.ones(2, 1, dtype=torch.bool)], 1)[:, None, None]
    more = torch.cat([keys, torch.randn(2, 2, 1, 16)], 2)
    result = way(torch.randn(2, 4, 1, 16), more, more, mask, state=state)
    assert result.mask.counts()[:, 0, 0].tolist() == [5 + 1, 20 + 1]
