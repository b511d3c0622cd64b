"""What a prefill records for evictions: in parts, in traces, after dense questions, and through the plug-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SIZES, attention, build, forced, tokens, wrap
from torch import Tensor
from transformers import DynamicCache, GlmConfig, GlmForCausalLM, PhiConfig, PhiForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

import sparse_attention_hub as hub
from sparse_attention_hub import AttentionInputs, ContextSummary, ResearchAttention
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.maskers.context_summary import PARTS
from sparse_attention_hub.models import LanguageModel, Prefilled, answer, answer_many, prefill, session, sparse_attention
from sparse_attention_hub.models import rotation as rotations
from sparse_attention_hub.models.rotation import FUTURE, Rotation
from sparse_attention_hub.models.trace import Trace, record_trace
from sparse_attention_hub.replay import replay

CONTEXT, QUESTION, OTHER, NEW = tokens(90), tokens(7, 2), tokens(7, 3), 6


def evictions() -> list[ResearchAttention]:
    sink, local = hub.SinkMaskerConfig(2), hub.LocalMaskerConfig(4)
    return [
        attention(sink, local, hub.SnapKVConfig(0.1, window_size=4, kernel_size=3)),
        attention(sink, local, hub.ExpectedAttentionConfig(0.1)),
        attention(sink, local, hub.KeyDiffConfig(0.1)),
        attention(sink, local, hub.KnormConfig(9)),
        attention(sink, local, hub.H2OConfig(0.1)),
        attention(sink, local, hub.TOVAConfig(0.1)),
    ]


class Sets:
    """A recorder of what each kv head attends to of the context, in the last row of a call, by layer."""

    def __init__(self) -> None:
        self.found: dict[int, list[Tensor]] = {}

    def __call__(self, *, layer_idx: int, result: Any, **_: Any) -> None:
        if result is not None:
            p = result.mask.inclusion_probability()[0, :, -1, : len(CONTEXT)]
            self.found.setdefault(layer_idx, []).append(p[:, :-4] > 0)  # without the window, which moves


def sets_of(lm: LanguageModel, prefilled: Prefilled, question: list[int], way: ResearchAttention, **options: Any) -> Any:
    recorder = Sets()
    answer(lm, prefilled, question, way, NEW, recorder=recorder, **options)
    return recorder.found


def queries_of(lm: LanguageModel) -> dict[int, Tensor]:
    """Queries (H, N, D) of each layer as its projection gives them, over the context."""
    found: dict[int, Tensor] = {}

    def keep(module: Any, _: Any, output: Tensor, layer: int) -> None:
        normed = getattr(lm.model.base_model.layers[layer].self_attn, "q_norm", None)
        heads = output.view(1, len(CONTEXT), -1, lm.model.config.head_dim)
        found[layer] = (heads if normed is None else normed(heads))[0].transpose(0, 1)

    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda m, a, o, layer=index: keep(m, a, o, layer))
        for index, layer in enumerate(lm.model.base_model.layers)
    ]
    with torch.no_grad():
        lm.model(torch.tensor([CONTEXT]))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_a_prefill_in_parts_records_what_one_pass_has(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = wrap(build(architecture))
    wanted = queries_of(lm)
    monkeypatch.setitem(session._CHUNKS, "cpu", 31)
    prefilled = prefill(lm, CONTEXT, 20, observe=PARTS)
    assert list(prefilled.summaries) == session.sparse_layers(lm)
    turn = Rotation(lm.model)
    for layer, summary in prefilled.summaries.items():
        assert summary.length == len(CONTEXT) and summary.queries is not None and summary.mean is not None
        undone = turn.undo(summary.queries, layer, len(CONTEXT) - 64)[0]
        torch.testing.assert_close(undone, wanted[layer][:, -64:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(summary.mean[0], wanted[layer][:, 4:].mean(1), atol=1e-4, rtol=1e-4)
        covariance = torch.stack([torch.cov(head[4:].T, correction=0) for head in wanted[layer]])
        torch.testing.assert_close(summary.covariance()[0], covariance, atol=1e-4, rtol=1e-4)
        whole = ContextSummary(frozenset(PARTS))
        keys, values = prefilled.context_keys(layer)
        queries = torch.cat([turned(turn, wanted[layer][None], layer)], 2)
        whole.add(AttentionInputs(queries, keys, values, scaling=summary.scaling), wanted[layer][None], summary.rotation)
        for name, tensor in whole.tensors().items():
            torch.testing.assert_close(summary.tensors()[name], tensor, atol=2e-4, rtol=2e-4, msg=name)


def turned(rotation: Rotation, queries: Tensor, layer: int) -> Tensor:
    """Queries with their rotary embedding."""
    cos, sin = rotation._factors(layer, torch.arange(queries.shape[2]))
    return rotation._rotate(layer, queries, cos, sin)


def test_the_rotation_to_come_is_the_mean_over_its_positions(llama: LanguageModel) -> None:
    rotation = Rotation(llama.model)
    one = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    matrix = rotation.to_come(0, 30, one)
    assert matrix is not None
    expected = turned(rotation, one.expand(-1, -1, 30 + FUTURE, -1), 0)[0, 0, 30:].mean(0)
    torch.testing.assert_close(matrix @ one[0, 0, 0], expected, atol=1e-5, rtol=1e-5)


def test_rotations_of_other_shapes_are_undone() -> None:
    """A part of the channels, neighbouring channels, and layers without an embedding."""
    torch.manual_seed(0)
    phi = PhiForCausalLM(PhiConfig(**SIZES, partial_rotary_factor=0.5)).eval()
    glm = GlmForCausalLM(GlmConfig(**SIZES, partial_rotary_factor=0.5)).eval()
    smol = SmolLM3ForCausalLM(SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 0])).eval()
    assert Rotation(phi).rotated == dict.fromkeys(range(4), 8)
    assert Rotation(glm).rotated == dict.fromkeys(range(4), 8)
    assert Rotation(smol).rotated == {0: 16, 1: 0, 2: 16, 3: 0}
    assert Rotation(smol).to_come(1, 5, torch.ones(1, 1, 1, 16)) is None


def test_a_rotation_that_is_not_known_is_said_when_it_is_needed(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other attentions of the same prefill are answered."""
    import transformers.models.llama.modeling_llama as code

    real = code.apply_rotary_pos_emb

    def odd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **rest: Any) -> Any:
        q, k = real(q, k, cos, sin, **rest)
        return q * (1 + cos[..., :1].unsqueeze(1)), k  # a scale of its own at each position

    monkeypatch.setattr(code, "apply_rotary_pos_emb", odd)
    ways = evictions()
    prefilled = prefill(llama, CONTEXT, 20, observe=PARTS)
    assert prefilled.observed == {"queries", "attention"}
    assert len(answer_many(llama, prefilled, QUESTION, [ways[0], ways[4]], 2)) == 2
    for ask in (
        lambda: answer(llama, prefilled, QUESTION, ways[1], 2),
        lambda: record_trace(llama, CONTEXT, QUESTION, 2, Path("never"), observe=PARTS),
        lambda: sparse_attention(llama, ways[1]).__enter__(),
    ):
        with pytest.raises(UserError, match="cannot be undone: leave ExpectedAttentionConfig out") as raised:
            ask()
        assert "\n" not in str(raised.value)


def test_what_was_not_recorded_is_said(llama: LanguageModel, tmp_path: Path) -> None:
    prefilled = prefill(llama, CONTEXT, 20)
    ways = evictions()
    with pytest.raises(UserError, match=r"did not record \(queries\): call prefill\(\.\.\., observe=attention\.observes\)"):
        answer(llama, prefilled, QUESTION, ways[0], 2)
    assert len(answer_many(llama, prefilled, QUESTION, [ways[2], ways[3]], 2)) == 2  # they choose by keys alone
    with pytest.raises(ValueError, match="the trace does not hold attention, queries, statistics"):
        replay(record_trace(llama, CONTEXT, QUESTION, 2, tmp_path / "t"), ways)


@pytest.mark.parametrize("sparse_from", ["question", "decode"])
def test_traces_hold_what_the_prefill_saw(sparse_from: Any, tmp_path: Path) -> None:
    """Replay keeps the keys that the model keeps, of a new prefill and of the trace's."""
    lm = wrap(build("llama"))
    ways = evictions()
    trace = record_trace(lm, CONTEXT, QUESTION, NEW, tmp_path / "t", sparse_from=sparse_from, observe=PARTS)
    reopened = Trace.open(tmp_path / "t")
    assert reopened is not None and reopened.observed == set(PARTS)
    again = reopened.prefilled(lm, 20)
    assert again is not None
    for way in ways:
        fresh = prefill(lm, CONTEXT, 20, observe=PARTS)
        wanted = sets_of(lm, fresh, QUESTION, way, sparse_from=sparse_from)
        found = sets_of(lm, again, QUESTION, way, sparse_from=sparse_from)
        for layer, sets in wanted.items():
            assert all(torch.equal(sets[0], other) for other in (*sets, *found[layer])), "the set changed"
        options = {"sparse_from": sparse_from, "stepwise": True}
        run = forced(lm, fresh, QUESTION, trace.answer_ids, way, **options)
        assert replay(trace, [way])[0].density == pytest.approx(run.density, abs=2e-3)


def test_a_dense_question_is_seen_and_forgotten(llama: LanguageModel) -> None:
    """Under decode the last rows are the question's: another one keeps other keys, and asking again gives the same."""
    way = evictions()[0]
    prefilled = prefill(llama, CONTEXT, 40, observe=way.observes)
    asked = [sets_of(llama, prefilled, ids, way, sparse_from="decode")[3][0] for ids in (QUESTION, OTHER, QUESTION)]
    assert torch.equal(asked[0], asked[2]) and not torch.equal(asked[0], asked[1])
    unseen = [sets_of(llama, prefilled, ids, way)[3][0] for ids in (QUESTION, OTHER)]
    assert torch.equal(*unseen)
    assert {summary.length for summary in prefilled.summaries.values()} == {len(CONTEXT)}


def test_the_trace_of_another_question_is_refused(llama: LanguageModel, tmp_path: Path) -> None:
    way = evictions()[0]
    trace = record_trace(llama, CONTEXT, QUESTION, 3, tmp_path / "t", sparse_from="decode", observe=way.observes)
    prefilled = trace.prefilled(llama, 20)
    assert prefilled is not None
    with pytest.raises(ValueError, match="the trace of another question"):
        answer(llama, prefilled, OTHER, way, 2, sparse_from="decode")


@pytest.mark.parametrize("way", range(6))
def test_the_plugin_gives_what_answer_gives(way: int, llama: LanguageModel) -> None:
    """The prefill is inside the `with`; a second question on the same cache leaves the set as it was."""
    chosen = evictions()[way]
    found = answer(llama, prefill(llama, CONTEXT, 30, observe=PARTS), QUESTION, chosen, NEW)
    cache, context = DynamicCache(config=llama.model.config), torch.tensor([CONTEXT])
    with sparse_attention(llama, chosen) as running, torch.no_grad():
        llama.model(context, past_key_values=cache)
        whole = torch.tensor([[*CONTEXT, *QUESTION]])
        out = llama.model.generate(whole, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        assert out[0, -NEW:].tolist() == found.token_ids
        assert running.density == pytest.approx(found.density, abs=1e-6)
        kept = running._items[0, 0].state.entry(0, 2).fitted.order
        turn = torch.cat([out, torch.tensor([OTHER])], 1)
        llama.model.generate(turn, past_key_values=cache, max_new_tokens=2, do_sample=False)
        assert running._items[0, 0].state.entry(0, 2).fitted.order is kept and kept.shape[2] == len(CONTEXT)


@pytest.mark.parametrize("way", range(6))
def test_padded_items_of_the_plugin_are_as_if_alone(way: int, llama: LanguageModel) -> None:
    chosen, model = evictions()[way], llama.model
    texts = [tokens(70), tokens(41, 5)]
    batch = torch.tensor([texts[0], [0] * 29 + texts[1]])
    mask = torch.tensor([[1] * 70, [0] * 29 + [1] * 41])
    question = torch.tensor([tokens(9, 7)] * 2)
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with sparse_attention(model, chosen), torch.no_grad():
        model(batch, past_key_values=cache, attention_mask=mask, position_ids=positions)
        later = mask.sum(1, keepdim=True) + torch.arange(9)
        whole = torch.cat([mask, torch.ones_like(question)], 1)
        together = model(question, past_key_values=cache, attention_mask=whole, position_ids=later).logits
    for i, text in enumerate(texts):
        alone = DynamicCache(config=model.config)
        with sparse_attention(model, chosen), torch.no_grad():
            model(torch.tensor([text]), past_key_values=alone)
            torch.testing.assert_close(
                together[i], model(question[i : i + 1], past_key_values=alone).logits[0], atol=1e-4, rtol=1e-4
            )


def test_rotations_are_probed_once_for_a_model(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    Rotation(llama.model)
    monkeypatch.setattr(rotations.Rotation, "_check", lambda self: pytest.fail("probed again"))
    assert Rotation(llama.model).rotated == dict.fromkeys(range(4), 16)
