"""Answers that are not numbers, rotary factors of the whole text, recurrent states and latents under the session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import few_keys, forced, tokens, wrap

from benchmark.execution.answer_sample import Prefix
from sparse_attention_hub import (
    AdaptiveSamplingMaskerConfig,
    OracleTopKConfig,
    OracleTopPMaskerConfig,
    PQCacheConfig,
    QuestTopKMaskerConfig,
    RandomSamplingMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    dense_attention,
    models,
)
from sparse_attention_hub.errors import NonFiniteError
from sparse_attention_hub.models import LanguageModel, answer, answer_many, dense, prefill, session
from sparse_attention_hub.models.probe import layer_calls
from sparse_attention_hub.models.rules import Rule
from sparse_attention_hub.models.survey_models import tiny_model
from sparse_attention_hub.models.trace import layer_bytes, record_trace

CONTEXT, QUESTION, NEW = tokens(90), tokens(11, seed=2), 7


def damaged(lm: LanguageModel) -> LanguageModel:
    """The model with one weight that is NaN, behind the attention of its last layer."""
    with torch.no_grad():
        lm.model.model.norm.weight[3] = float("nan")
    return lm


@pytest.mark.parametrize("way", [None, few_keys()[1]])
def test_logits_that_are_not_finite_are_no_answer(llama: LanguageModel, way: Any) -> None:
    prefilled = prefill(damaged(llama), CONTEXT, 40)
    names = "dense" if way is None else "SinkMaskerConfig.*OracleTopKConfig"
    with pytest.raises(NonFiniteError, match=f"not finite under .*{names}.* attention after 0 tokens"):
        answer(llama, prefilled, QUESTION, way, 5)
    for count, stepwise in ((4, False), (4, True), (1, False)):
        with pytest.raises(NonFiniteError):
            forced(llama, prefilled, QUESTION, tokens(count), way, stepwise=stepwise)


@pytest.mark.parametrize("way", [None, few_keys()[1]])
def test_numbers_of_a_later_token_that_are_not_finite_are_no_answer(llama: LanguageModel, way: Any) -> None:
    prefilled, question = prefill(llama, CONTEXT, 40), tokens(3, seed=3)
    token = answer(llama, prefilled, question, way, 1).token_ids[0]
    assert token not in question
    with torch.no_grad():
        llama.model.model.embed_tokens.weight[token] = float("nan")
    with pytest.raises(NonFiniteError, match="after 1 tokens"):
        answer(llama, prefilled, question, way, 5)
    for stepwise in (False, True):
        with pytest.raises(NonFiniteError, match="after 1 tokens"):
            forced(llama, prefilled, question, [token, *tokens(4)], way, stepwise=stepwise)


def test_numbers_beyond_float16_are_no_answer(llama: LanguageModel) -> None:
    with torch.no_grad():
        llama.model.lm_head.weight *= 5e4
    assert len(answer(llama, prefill(llama, CONTEXT, 40), QUESTION, None, 5).token_ids) == 5
    half = wrap(llama.model.half())
    with pytest.raises(NonFiniteError, match="take bfloat16 or float32"):
        answer(half, prefill(half, CONTEXT, 40), QUESTION, None, 5)


def test_a_row_that_is_finite_is_answered_where_another_is_not(llama: LanguageModel) -> None:
    """A damaged key far back reaches dense attention alone."""
    prefilled = prefill(llama, CONTEXT, 40)
    expected = answer(llama, prefilled, QUESTION, few_keys()[0], NEW)
    for layer in prefilled.cache.layers:
        layer._buffers[0][:, :, 40] = float("nan")
    with pytest.raises(NonFiniteError, match="under dense"):
        answer_many(llama, prefilled, QUESTION, [few_keys()[0], None], NEW)
    assert answer(llama, prefilled, QUESTION, few_keys()[0], NEW).token_ids == expected.token_ids


def one_pass(lm: LanguageModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = lm.model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("kind", ["phi3 with longrope", "llama with dynamic RoPE"])
@pytest.mark.parametrize("context", [60, 86, 97, 180])
def test_rotary_factors_are_those_of_the_whole_text(kind: str, context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors change at 100 tokens: behind all of it, in the answer, in the question, and within the context."""
    monkeypatch.setitem(session._CHUNKS, "cpu", 32)
    lm = wrap(tiny_model(kind))
    text, expected = tokens(context), tokens(4, 5)
    prefilled = prefill(lm, text, len(QUESTION) + len(expected))
    ids = text + QUESTION + expected
    nll = torch.nn.functional.cross_entropy(one_pass(lm, ids)[len(text + QUESTION) - 1 : -1], torch.tensor(expected)).item()
    for stepwise in (False, True):
        assert forced(lm, prefilled, QUESTION, expected, None, stepwise=stepwise).nll == pytest.approx(nll, abs=1e-4)
    one_pass(lm, tokens(400))  # a longer text changes the factors that the model keeps
    assert forced(lm, prefilled, QUESTION, expected, None).nll == pytest.approx(nll, abs=1e-4)


@pytest.mark.parametrize(("kind", "prefills"), [("phi3 with longrope", 2), ("llama with dynamic RoPE", 3), ("llama", 1)])
def test_questions_on_one_context_do_not_change_each_others_factors(
    kind: str, prefills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factors change at 100 tokens. A prefill serves all questions that have the same ones."""
    lm, text, expected, made = wrap(tiny_model(kind)), tokens(80), tokens(4, 5), []

    def count(*given: Any) -> Any:
        made.append(given)
        return prefill(*given)

    monkeypatch.setattr(models, "prefill", count)
    prefix = Prefix(lm)
    for question in (tokens(5), tokens(11), tokens(17), tokens(30)):
        length = len(text + question + expected)
        together = prefix.get(text, 40, frozenset(), length)
        alone = prefill(lm, text, length - len(text))
        ways = [forced(lm, each, question, expected, None).nll for each in (together, alone)]
        assert ways[0] == pytest.approx(ways[1], abs=1e-5)
    assert len(made) == prefills


@pytest.mark.parametrize("kind", ["qwen3_next", "jamba", "falcon_h1"])
def test_recurrent_states_are_forked_and_rewound(kind: str) -> None:
    """A row gives alone what it gives in a batch, after others, and where other rows ended before it."""
    lm = wrap(tiny_model(kind))
    ways = [*few_keys(), None]
    prefilled = prefill(lm, CONTEXT, 40)
    for sparse_from in ("question", "decode"):
        together = answer_many(lm, prefilled, QUESTION, ways, 9, sparse_from=sparse_from)  # type: ignore[arg-type]
        lm.eos_token_ids = frozenset(together[0].token_ids[3:4])
        again = answer_many(lm, prefilled, QUESTION, ways, 9, sparse_from=sparse_from)  # type: ignore[arg-type]
        for way, first, ended in zip(ways, together, again, strict=True):
            assert first.token_ids[: len(ended.token_ids)] == ended.token_ids
            alone = answer(lm, prefill(lm, CONTEXT, 40), QUESTION, way, 9, sparse_from=sparse_from)  # type: ignore[arg-type]
            assert alone.token_ids == ended.token_ids
        lm.eos_token_ids = frozenset()


def test_the_latent_counts_as_what_is_read() -> None:
    """Each head of an MLA model chooses its own keys, but all read one latent: a key that any of them chose is read."""
    lm = wrap(tiny_model("deepseek_v3"))
    prefilled = prefill(lm, CONTEXT, 40)
    by_position, by_score = answer_many(lm, prefilled, QUESTION, [few_keys()[0], few_keys()[2]], NEW)
    assert by_position.kv_fraction == pytest.approx(by_position.density)
    assert by_score.density is not None and by_score.kv_fraction is not None
    assert 1 + by_score.density < by_score.kv_fraction < 1 + 4 * by_score.density + 1e-6  # to score keys, all of it is read


SPARSE = [
    *(
        OracleTopKConfig(0.2),
        OracleTopPMaskerConfig(0.7),
        QuestTopKMaskerConfig(0.3, 8),
        PQCacheConfig(0.2, 4, 4, 5, 0, "euclidean"),
    ),
    *(RandomSamplingMaskerConfig(0.3), AdaptiveSamplingMaskerConfig(0.1, 0.2, 0.2, 2, 2)),
]


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("masker", SPARSE, ids=lambda masker: type(masker).__name__)
def test_softcap_and_sinks_are_in_the_output(masker: Any, rows: int, backend: str) -> None:
    """The output is that of the chosen keys' capped logits and the sinks, weighted by 1/p; full budget gives dense attention."""
    torch.manual_seed(0)
    queries, keys, values = torch.randn(1, 8, rows, 16) * 3, torch.randn(1, 2, 60, 16) * 3, torch.randn(1, 2, 60, 24)
    rule: dict[str, Any] = {"softcap": 4.0, "sinks": torch.randn(8) * 2}
    result = ResearchAttention(ResearchAttentionConfig([masker], backend=backend))(queries, keys, values, **rule)
    wide, weights = keys.repeat_interleave(4, 1), result.mask.inclusion_probability()
    logits = 4.0 * torch.tanh(queries @ wide.mT * 0.25 / 4.0)
    terms = torch.where(weights > 0, logits.exp() / weights.clamp(min=1e-9), 0.0)
    total = terms.sum(-1, keepdim=True) + rule["sinks"].view(1, -1, 1, 1).exp()
    expected = ((terms / total) @ values.repeat_interleave(4, 1)).transpose(1, 2)
    torch.testing.assert_close(result.output, expected, atol=1e-5, rtol=1e-5)
    causal = torch.ones(rows, 60, dtype=torch.bool).tril(60 - rows)
    whole = torch.where(causal, logits.exp(), 0.0)
    whole = whole / (whole.sum(-1, keepdim=True) + rule["sinks"].view(1, -1, 1, 1).exp())
    dense = (whole @ values.repeat_interleave(4, 1)).transpose(1, 2)
    torch.testing.assert_close(dense_attention(queries, keys, values, **rule), dense, atol=1e-5, rtol=1e-5)
    error = (result.output - dense).norm(dim=-1) / dense.norm(dim=-1)
    torch.testing.assert_close(result.error_rows(), error.transpose(1, 2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (9, None), (None, 8), (1, None), (100, None)])
def test_dense_rows_knows_every_rule(window: int | None, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_ROWS", 8)
    for length, total in [(1, 40), (20, 20), (13, 40), (33, 40)]:
        queries, keys, values = torch.randn(1, 6, length, 16), torch.randn(1, 2, total, 16), torch.randn(1, 2, total, 24)
        row, key = torch.arange(total - length, total)[:, None], torch.arange(total)
        seen = (key <= row) & (key > row - (window or total)) & (key // (chunk or total) == row // (chunk or total))
        for softcap, sinks in [(None, None), (2.0, None), (None, torch.randn(6)), (2.0, torch.randn(6))]:
            rule = Rule(window, chunk, softcap, sinks)
            logits = queries @ keys.repeat_interleave(3, 1).mT * 0.3
            logits = (softcap * torch.tanh(logits / softcap) if softcap else logits).masked_fill(~seen, float("-inf"))
            if sinks is not None:
                logits = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(1, 6, length, 1)], -1)
            expected = (logits.softmax(-1)[..., :total] @ values.repeat_interleave(3, 1)).transpose(1, 2)
            torch.testing.assert_close(dense.dense_rows(queries, keys, values, 0.3, rule), expected, atol=1e-5, rtol=1e-5)
            found = dense.dense_with_mask(queries, keys, values, seen[None, None], 0.3, rule)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_next", "llama4_text"])
def test_sizes_are_foretold(kind: str, tmp_path: Path) -> None:
    lm = wrap(tiny_model(kind))
    prefilled = prefill(lm, CONTEXT, 38)
    buffers = sum(tensor.nbytes for layer in prefilled.cache.attention for tensor in layer._buffers)
    assert buffers == 128 * 4 * sum(call.token_numbers for call in layer_calls(lm).values())
    trace = record_trace(lm, CONTEXT, QUESTION, NEW, tmp_path / "trace")
    rows = len(QUESTION) + NEW - 1
    foretold = len(trace.layers) * layer_bytes(lm, len(CONTEXT) + rows, rows)
    assert foretold == pytest.approx(trace.nbytes, rel=0.05)
