"""Prefill once, ask many times: equal to the model's own forward pass, in lockstep, repeatable, and measured."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import all_keys, attention, build, few_keys, forced, tokens, wrap

from sparse_attention_hub import (
    LocalMaskerConfig,
    Mask,
    Masker,
    MaskerConfig,
    OracleTopKConfig,
    QuestTopKMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
    register_masker,
)
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.maskers.state import MaskerState
from sparse_attention_hub.models import (
    LanguageModel,
    answer,
    answer_many,
    dense,
    forced_and_answered,
    forced_many,
    lockstep,
    prefill,
    session,
)
from sparse_attention_hub.models.rules import Rule

CONTEXT, QUESTION, NEW = tokens(90), tokens(11, seed=2), 7


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The plainest generation there is: the whole text through the model for each token, no cache."""
    text = list(ids)
    for _ in range(count):
        with torch.no_grad():
            text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(ids) :]


@pytest.mark.parametrize("sparse_from", ["question", "decode"])
def test_all_keys_equal_dense(any_model: LanguageModel, sparse_from: Any) -> None:
    expected = greedy(any_model.model, CONTEXT + QUESTION, NEW)
    with torch.no_grad():
        logits = any_model.model(torch.tensor([CONTEXT + QUESTION + expected])).logits[0, -NEW - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(expected)).item()
    prefilled = prefill(any_model, CONTEXT, 40)
    ways = [None, *all_keys()]
    for found in answer_many(any_model, prefilled, QUESTION, ways, NEW, sparse_from=sparse_from):
        assert found.token_ids == expected
        assert found.stopped == "length"
    for way, one in zip(
        ways, forced_many(any_model, prefilled, QUESTION, expected, ways, sparse_from=sparse_from), strict=True
    ):
        assert one.reproduced
        assert one.nll == pytest.approx(nll, abs=1e-5)
        only_windows = (
            getattr(any_model.model.config, "sliding_window", None) and any_model.model.config.model_type == "mistral"
        )
        assert one.density == (None if way is None or only_windows else 1.0)


def test_prefill_cache_equals_the_models_own(any_model: LanguageModel) -> None:
    prefilled = prefill(any_model, CONTEXT, 5)
    with torch.no_grad():
        logits = any_model.model(torch.tensor([CONTEXT])).logits[0, -1]
        cut = prefill(any_model, CONTEXT[:-1], 5).cache
        last = any_model.model(torch.tensor([CONTEXT[-1:]]), past_key_values=cut).logits[0, -1]
    assert torch.allclose(last, logits, atol=1e-5)
    keys, values = prefilled.context_keys(1)
    assert keys.shape == values.shape == (1, 2, 90, 16)
    assert prefilled.room == 5


def test_question_longer_than_one_block(any_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_ROWS", 5)
    found = answer(any_model, prefill(any_model, CONTEXT, 40), QUESTION, None, NEW)
    assert found.token_ids == greedy(any_model.model, CONTEXT + QUESTION, NEW)


@pytest.mark.parametrize("sparse_from", ["question", "decode"])
def test_lockstep_gives_the_tokens_of_one_at_a_time(any_model: LanguageModel, sparse_from: Any) -> None:
    ways = [*few_keys(), None]
    prefilled = prefill(any_model, CONTEXT, 40)
    together = answer_many(any_model, prefilled, QUESTION, ways, NEW, sparse_from=sparse_from, seed=3)
    for way, found in zip(ways, together, strict=True):
        alone = answer(any_model, prefill(any_model, CONTEXT, 40), QUESTION, way, NEW, sparse_from=sparse_from, seed=3)
        assert (found.token_ids, found.text, found.stopped) == (alone.token_ids, alone.text, alone.stopped)
        assert found.density == (None if alone.density is None else pytest.approx(alone.density, abs=1e-6))
    forced_together = forced_many(any_model, prefilled, QUESTION, tokens(6, 9), ways, sparse_from=sparse_from, seed=3)
    for way, found_forced in zip(ways, forced_together, strict=True):
        alone_forced = forced(any_model, prefilled, QUESTION, tokens(6, 9), way, sparse_from=sparse_from, seed=3)
        assert found_forced.nll == pytest.approx(alone_forced.nll, abs=1e-4)


def test_sparse_attention_changes_the_answer(llama: LanguageModel) -> None:
    prefilled = prefill(llama, CONTEXT, 40)
    dense, sparse = answer_many(llama, prefilled, QUESTION, [None, few_keys()[0]], 20)
    assert dense.token_ids != sparse.token_ids
    assert sparse.density is not None and 0.04 < sparse.density < 0.08
    assert sparse.kv_fraction is not None and sparse.kv_fraction == pytest.approx(sparse.density, abs=0.01)


def test_under_decode_the_first_token_is_dense(llama: LanguageModel) -> None:
    prefilled = prefill(llama, CONTEXT, 40)
    dense, sparse = answer_many(llama, prefilled, QUESTION, [None, few_keys()[0]], 1, sparse_from="decode")
    assert dense.token_ids == sparse.token_ids
    assert sparse.density is None  # no row was attended to sparsely


@pytest.mark.parametrize("sparse_from", ["question", "decode"])
def test_asking_again_gives_the_same(any_model: LanguageModel, sparse_from: Any) -> None:
    ways = [*few_keys(), None, few_keys()[0]]
    prefilled = prefill(any_model, CONTEXT, 60)
    first = answer_many(any_model, prefilled, QUESTION, ways, NEW, sparse_from=sparse_from)
    answer_many(any_model, prefilled, tokens(20, seed=8), ways[:3], 12, sparse_from=sparse_from)
    forced(any_model, prefilled, QUESTION, tokens(4, 5), ways[1], sparse_from=sparse_from)
    assert prefilled.cache.get_seq_length() == len(CONTEXT)
    again = answer_many(any_model, prefilled, QUESTION, ways, NEW, sparse_from=sparse_from)
    assert [a.token_ids for a in again] == [a.token_ids for a in first]
    assert [a.density for a in again] == [a.density for a in first]


def test_the_same_attention_twice_in_a_batch(llama: LanguageModel) -> None:
    way = few_keys()[1]
    prefilled = prefill(llama, CONTEXT, 40)
    one, two = answer_many(llama, prefilled, QUESTION, [way, way], NEW)
    assert one.token_ids == two.token_ids == answer(llama, prefilled, QUESTION, way, NEW).token_ids


def test_eos_ends_a_row_and_the_others_go_on(llama: LanguageModel) -> None:
    ways = [None, *few_keys()]
    prefilled = prefill(llama, CONTEXT, 60)
    free = answer_many(llama, prefilled, QUESTION, ways, 12)
    eos = free[0].token_ids[4]
    llama.eos_token_ids = frozenset({eos})
    counted = Count()
    for before, after in zip(
        free, answer_many(llama, prefilled, QUESTION, ways, 12, recorders=[counted, *[None] * 4]), strict=True
    ):
        stop = before.token_ids.index(eos) + 1 if eos in before.token_ids else 12
        assert after.token_ids == before.token_ids[:stop]
        assert after.stopped == ("eos" if eos in before.token_ids else "length")
    rows = free[0].token_ids.index(eos)
    # The row that was predicted as EOS is never fed: question, then one step for each token before it.
    assert counted.steps == [step for step in range(rows + 1) for _ in range(4)]


def test_eos_as_the_first_token(llama: LanguageModel) -> None:
    prefilled = prefill(llama, CONTEXT, 40)
    llama.eos_token_ids = frozenset(answer(llama, prefilled, QUESTION, None, 1).token_ids)
    found = answer(llama, prefilled, QUESTION, None, 5)
    assert found.stopped == "eos" and len(found.token_ids) == 1


def test_an_answer_that_ends_with_eos_is_forced_and_reproduced(llama: LanguageModel) -> None:
    prefilled = prefill(llama, CONTEXT, 60)
    found = answer(llama, prefilled, QUESTION, few_keys()[1], 9)
    llama.eos_token_ids = frozenset(found.token_ids[-1:])
    found = answer(llama, prefilled, QUESTION, few_keys()[1], 20)
    assert found.stopped == "eos"
    again = forced(llama, prefilled, QUESTION, found.token_ids, few_keys()[1])
    assert again.reproduced
    assert again.density == pytest.approx(found.density, rel=0.05)
    assert not forced(llama, prefilled, QUESTION, [*found.token_ids[:-1], found.token_ids[-1] ^ 1], few_keys()[1]).reproduced


def test_the_question_of_a_forced_answer_is_attended_to_as_in_generation(llama: LanguageModel) -> None:
    """A fraction of N is of what the question sees, whatever answer follows: 0.1 of 99 keys are 9, of 104 they are 10."""
    seen: list[list[tuple[int, Any]]] = []

    def keep(*, layer_idx: int, result: Any, step: int, **_: Any) -> None:
        if step == 0:
            seen[-1].append((layer_idx, result.mask.inclusion_probability()))

    prefilled = prefill(llama, tokens(99 - len(QUESTION), 4), 40)
    way = ResearchAttention(ResearchAttentionConfig([OracleTopKConfig(0.1)]))
    seen.append([])
    real = answer(llama, prefilled, QUESTION, way, 9, recorder=keep)
    seen.append([])
    forced(llama, prefilled, QUESTION, real.token_ids, way, recorder=keep)
    assert len(seen[0]) == llama.num_layers
    for (layer_idx, expected), (told, found) in zip(*seen, strict=True):
        assert layer_idx == told and torch.equal(expected, found)


@pytest.mark.parametrize("sparse_from", ["question", "decode"])
def test_an_answer_forced_step_by_step_is_its_generation(any_model: LanguageModel, sparse_from: Any) -> None:
    """Fractions of a growing N and pages that fill up: all of it goes as in generation, for every row of a batch."""
    prefilled = prefill(any_model, CONTEXT, 40)
    pages = ResearchAttention(ResearchAttentionConfig([SinkMaskerConfig(0.01), QuestTopKMaskerConfig(0.5, 16)]))
    fractions = ResearchAttention(ResearchAttentionConfig([LocalMaskerConfig(0.33), OracleTopKConfig(0.49)]))
    for way in (pages, fractions, None):
        real = answer(any_model, prefilled, QUESTION, way, 15, sparse_from=sparse_from, seed=3)
        for found in forced_many(
            any_model, prefilled, QUESTION, real.token_ids, [way, way], sparse_from=sparse_from, seed=3, stepwise=True
        ):
            assert found.reproduced
            assert (found.density, found.kv_fraction) == (real.density, real.kv_fraction)
        one_pass = forced(any_model, prefilled, QUESTION, real.token_ids, way, sparse_from=sparse_from, seed=3)
        assert one_pass.nll == pytest.approx(found.nll, rel=0.2)


@pytest.mark.parametrize("sparse_from", ["question", "decode"])
def test_forced_and_answered_is_both_in_one_pass(any_model: LanguageModel, sparse_from: Any) -> None:
    """Also for maskers that keep codes of the keys so far, for a row alone, and for forks that end before the given answer."""
    prefilled = prefill(any_model, CONTEXT, 40)
    pages = ResearchAttention(ResearchAttentionConfig([SinkMaskerConfig(0.01), QuestTopKMaskerConfig(0.3, 4)]))
    ways, how = [*few_keys(), pages, None], {"sparse_from": sparse_from, "seed": 3}
    dense_ids = answer(any_model, prefilled, QUESTION, None, 12).token_ids
    for given in (dense_ids, [*dense_ids[:5], *tokens(7, seed=9)]):
        any_model.eos_token_ids = frozenset()
        free = answer_many(any_model, prefilled, QUESTION, ways, 12, **how)
        any_model.eos_token_ids = frozenset(token for one in free for token in one.token_ids[7:8]) - {*given}
        free = answer_many(any_model, prefilled, QUESTION, ways, 12, **how)
        counted = [Count() for _ in ways]
        fed = forced_many(any_model, prefilled, QUESTION, given, ways, **how, stepwise=True, recorders=counted)
        assert fed[-1].reproduced == (given == dense_ids)
        for rows in (slice(None), slice(0, 1), slice(4, 5), slice(-1, None)):
            again = [Count() for _ in ways[rows]]
            found = forced_and_answered(any_model, prefilled, QUESTION, given, ways[rows], 12, **how, recorders=again)
            assert prefilled.cache.get_seq_length() == len(CONTEXT)
            for (one, own), expected, alone in zip(found, fed[rows], free[rows], strict=True):
                assert one.nll == pytest.approx(expected.nll, abs=1e-5) and one.reproduced == expected.reproduced
                assert (own.token_ids, own.text, own.stopped) == (alone.token_ids, alone.text, alone.stopped)
                assert own.seconds > 0
                for mine, theirs in ((one, expected), (own, alone)):
                    assert (mine.density, mine.kv_fraction) == pytest.approx((theirs.density, theirs.kv_fraction), abs=1e-7)
            assert [count.shapes for count in again] == [count.shapes for count in counted[rows]]


class Count:
    """A recorder that notes what it is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.shapes: list[tuple[int, int]] = []
        self.layers: list[int] = []
        self.results: list[Any] = []

    def __call__(self, *, layer_idx: int, result: Any, queries: Any, keys: Any, values: Any, scaling: float, step: int) -> None:
        self.steps.append(step)
        self.shapes.append((queries.shape[2], keys.shape[2]))
        self.layers.append(layer_idx)
        self.results.append(result)


def test_recorders_see_every_row_once(llama: LanguageModel) -> None:
    dense, sparse = Count(), Count()
    prefilled = prefill(llama, CONTEXT, 40)
    answer_many(llama, prefilled, QUESTION, [None, few_keys()[0]], 3, recorders=[dense, sparse])
    assert dense.shapes == sparse.shapes == [(11, 101)] * 4 + [(1, 102)] * 4 + [(1, 103)] * 4
    assert dense.layers == [0, 1, 2, 3] * 3
    assert all(result is None for result in dense.results) and all(0 < r.density < 1 for r in sparse.results)
    dense, sparse = Count(), Count()
    answer_many(llama, prefilled, QUESTION, [None, few_keys()[0]], 3, recorders=[dense, sparse], sparse_from="decode")
    assert dense.shapes == [(11, 101)] * 4 + [(1, 102)] * 4 + [(1, 103)] * 4
    assert sparse.shapes == [(1, 102)] * 4 + [(1, 103)] * 4


def test_sliding_layers_stay_dense_and_are_not_recorded() -> None:
    lm = wrap(build("gemma3"))
    counted = Count()
    answer(lm, prefill(lm, CONTEXT, 40), QUESTION, few_keys()[0], 2, recorder=counted)
    assert set(counted.layers) == {1, 3}


class WatchedConfig(MaskerConfig):
    pass


@register_masker(WatchedConfig)
class Watched(Masker[WatchedConfig]):
    """Codes keys, attends to the last one, and keeps the lengths of what it is told."""

    fitted: ClassVar[list[tuple[int, int]]] = []
    coded: ClassVar[list[int]] = []

    def fit(self, keys: Any, allowed: Any, layer_idx: int) -> Any:
        self.fitted.append((layer_idx, keys.shape[2]))
        return True

    def encode(self, keys: Any, fitted: Any, layer_idx: int) -> Any:
        self.coded.append(keys.shape[2])
        return keys[..., :1].clone()

    def select(self, inputs: Any, mask: Any) -> Any:
        _, codes = self.codes(inputs)
        assert torch.equal(codes, inputs.keys[..., :1])
        return mask.union(Mask.from_range(inputs.shape[3] - 1, inputs.shape[3], inputs.shape, kv_heads=inputs.kv_heads))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    monkeypatch.setattr(Watched, "fitted", [])
    monkeypatch.setattr(Watched, "coded", [])
    return Watched


@pytest.mark.parametrize("sparse_from", ["question", "decode"])
def test_maskers_learn_the_context_once_and_codes_are_rewound(
    llama: LanguageModel, watched: type[Watched], sparse_from: Any
) -> None:
    way, prefilled = attention(WatchedConfig()), prefill(llama, CONTEXT, 40)
    first = answer(llama, prefilled, QUESTION, way, 3, sparse_from=sparse_from)
    assert watched.fitted == [(layer, 90) for layer in range(4)]
    in_one_answer = [length for length in watched.coded if length != 90]
    assert len(in_one_answer) == 4 * (len(watched.coded) // 4 - 1)
    again = answer(llama, prefilled, QUESTION, way, 3, sparse_from=sparse_from)
    assert again == dataclasses.replace(first, seconds=again.seconds)
    assert watched.fitted == [(layer, 90) for layer in range(4)]
    assert [length for length in watched.coded if length != 90] == 2 * in_one_answer  # the tail is coded anew, no more
    prefilled.forget()
    answer(llama, prefilled, QUESTION, way, 3, sparse_from=sparse_from)
    assert watched.fitted == 2 * [(layer, 90) for layer in range(4)]


def test_rows_whose_codes_are_equal_learn_the_context_together(llama: LanguageModel, watched: type[Watched]) -> None:
    ways = [attention(WatchedConfig()), attention(SinkMaskerConfig(3), WatchedConfig()), attention(LocalMaskerConfig(9))]
    together = answer_many(llama, prefill(llama, CONTEXT, 40), QUESTION, ways, NEW)
    assert watched.fitted == [(layer, 90) for layer in range(4)]
    for way, given in zip(ways, together, strict=True):
        assert answer(llama, prefill(llama, CONTEXT, 40), QUESTION, way, NEW).token_ids == given.token_ids


@pytest.mark.parametrize("given", [[], tokens(5), tokens(13)])
def test_forced_and_answered_takes_answers_that_were_generated(llama: LanguageModel, given: list[int]) -> None:
    with pytest.raises(ValueError, match=f"got {len(given)} tokens without EOS: take an answer that was generated"):
        forced_and_answered(llama, prefill(llama, CONTEXT, 40), QUESTION, given, few_keys(), 12)


def test_forks_of_a_state_go_on_by_themselves() -> None:
    state = MaskerState()
    state.fitted, state.fit_length = True, 8
    state.append(torch.arange(8.0).view(1, 1, 8, 1))
    forks = [state.fork(8), state.fork(8)]
    for number, fork in enumerate([*forks, state]):
        fork.append(torch.full((1, 1, 2, 1), 100.0 + number))
        fork.append(torch.full((1, 1, 1, 1), 200.0 + number))
    for number, fork in enumerate([*forks, state]):
        assert fork.codes().flatten().tolist() == [*range(8), 100 + number, 100 + number, 200 + number]
    assert state.fork(9).codes().flatten().tolist() == [*range(8), 102]
    assert not state.fork(7).is_fitted and state.is_fitted


def test_unfinished_codes_are_read_but_not_kept() -> None:
    def codes(*values: float) -> torch.Tensor:
        return torch.tensor(values).view(1, 1, -1, 1)

    state = MaskerState()
    assert state.codes(codes(7.0)).flatten().tolist() == [7.0]
    state.fitted, state.fit_length = True, 3
    state.append(codes(0.0, 1.0, 2.0))
    forks = [state.fork(3), state.fork(3)]
    for number, fork in enumerate(forks):
        assert fork.codes(codes(5.0 + number)).flatten().tolist() == [0, 1, 2, 5 + number]
        fork.append(codes(8.0 + number))
    for number, fork in enumerate(forks):
        assert fork.codes(codes(6.0)).flatten().tolist() == [0, 1, 2, 8 + number, 6]
        assert fork.codes().flatten().tolist() == [0, 1, 2, 8 + number]
    assert state.codes().flatten().tolist() == [0, 1, 2]


def test_a_failure_inside_leaves_the_prefill_usable(llama: LanguageModel) -> None:
    way = few_keys()[1]
    prefilled = prefill(llama, CONTEXT, 40)
    expected = answer(llama, prefilled, QUESTION, way, NEW)

    def fail(*, step: int, **_: Any) -> None:
        if step == 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        answer_many(llama, prefilled, QUESTION, [way, None], NEW, recorders=[fail, None])
    assert llama.model.config._attn_implementation == "sdpa"
    assert answer(llama, prefilled, QUESTION, way, NEW).token_ids == expected.token_ids


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_a_prefill_in_chunks_equals_one_as_a_whole(
    any_model: LanguageModel, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prefill(any_model, CONTEXT, 5)
    monkeypatch.setitem(session._CHUNKS, "cpu", chunk)
    parts = prefill(any_model, CONTEXT, 5)
    for layer in range(any_model.num_layers):
        for one, other in zip(parts.context_keys(layer), whole.context_keys(layer), strict=True):
            assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 9, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dense_rows_is_softmax_over_what_each_row_may_see(
    window: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_ROWS", 8)
    for length, total in [(1, 40), (20, 20), (13, 40), (16, 45), (32, 33), (40, 75)]:
        queries = torch.randn(1, 6, length, 16).to(dtype)
        buffer = torch.randn(2, 1, 2, total + 5, 16).to(dtype)  # a cache hands over the front of its buffers
        keys, values = buffer[0, :, :, :total], buffer[1, :, :, :total]
        age = torch.arange(total - length, total)[:, None] - torch.arange(total)
        seen = (age >= 0) & (age < (window or total))
        wide = keys.double().repeat_interleave(3, 1), values.double().repeat_interleave(3, 1)
        scores = (queries.double() @ wide[0].mT * 0.3).masked_fill(~seen, float("-inf"))
        expected = (scores.softmax(-1) @ wide[1]).transpose(1, 2)
        for join in (dense._can_join, lambda *_: False):  # and with masks, as a GPU does
            with monkeypatch.context() as patched:
                patched.setattr(dense, "_can_join", join)
                found = dense.dense_rows(queries, keys, values, 0.3, Rule(window=window))
            assert found.dtype == dtype
            assert torch.allclose(found.double(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_bad_input_is_told(llama: LanguageModel) -> None:
    prefilled = prefill(llama, CONTEXT, 12)
    for call, words in [
        (lambda: answer(llama, prefilled, QUESTION, None, 0), "max_new_tokens must be >= 1"),
        (lambda: answer(llama, prefilled, [], None, 1), "question has no tokens"),
        (lambda: answer(llama, prefilled, QUESTION, None, 3), "room for 12 tokens, question and answer take 13"),
        (lambda: answer(llama, prefilled, QUESTION, None, 1, sparse_from="answer"), "sparse_from must be"),
        (lambda: forced(llama, prefilled, QUESTION, [], None), "answer has no tokens"),
        (lambda: prefill(llama, [], 5), "context has no tokens"),
        (lambda: prefill(llama, tokens(1025), 5), "takes 1024"),
    ]:
        with pytest.raises(UserError, match=words):
            call()  # type: ignore[no-untyped-call]
    assert len(answer(llama, prefilled, QUESTION, None, 2).token_ids) == 2  # exactly as many as fit


def test_dense_rows_are_not_cudnns(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN builds a graph for every new number of keys. Only a GPU asks for it, so what was allowed is looked at."""
    allowed = []

    def watch(*arguments: Any) -> Any:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return dense.dense_rows(*arguments)

    monkeypatch.setattr(lockstep, "dense_rows", watch)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        answer_many(llama, prefill(llama, CONTEXT, 40), QUESTION, [None, few_keys()[0]], NEW)
        assert len(allowed) >= NEW * 4 and not any(allowed)
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_prefill_leaves_out_what_the_last_layer_does_with_its_keys(llama: LanguageModel) -> None:
    ran: list[int] = []
    layers = llama.model.model.layers
    hooks = [layer.mlp.register_forward_hook(lambda *_, place=place: ran.append(place)) for place, layer in enumerate(layers)]
    try:
        prefilled = prefill(llama, CONTEXT, 40)
        assert ran == list(range(len(layers) - 1))
        answer(llama, prefilled, QUESTION, None, 1)
        assert ran[len(layers) - 1 :] == list(range(len(layers)))
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        whole = llama.model(torch.tensor([CONTEXT]), use_cache=True).past_key_values
    for layer in range(len(layers)):
        keys, values = prefilled.context_keys(layer)
        assert torch.allclose(keys, whole.layers[layer].keys, atol=1e-5)
        assert torch.allclose(values, whole.layers[layer].values, atol=1e-5)
