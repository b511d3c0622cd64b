"""The plug-in under transformers' own caches and `generate`; the traps of its attention interface, each shown and
passed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, all_keys, attention, build, few_keys, forced, tokens, wrap
from transformers import AttentionInterface, DynamicCache, LlamaConfig, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparse_attention_hub import Mask, Masker, MaskerConfig, register_masker
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.models import answer, plugin, prefill, sparse_attention
from sparse_attention_hub.models.cache import SharedPrefixCache
from sparse_attention_hub.models.lockstep import LOCKSTEP
from sparse_attention_hub.models.plugin import PLUGIN
from sparse_attention_hub.models.session import sparse_layers

CONTEXT, QUESTION = tokens(70), tokens(12, seed=2)


def ids(*parts: list[int]) -> torch.Tensor:
    return torch.tensor([sum(parts, [])])


@torch.no_grad()
def logits(model: Any, tokens_: torch.Tensor, cache: Any = None, **kwargs: Any) -> torch.Tensor:
    return model(tokens_, past_key_values=cache, **kwargs).logits


def filled(model: Any, text: list[int] = CONTEXT) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    logits(model, ids(text), cache)
    return cache


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "mistral_sliding"])  # has windows only
@pytest.mark.parametrize("way", range(len(all_keys())))
def test_all_keys_equal_dense_on_a_dynamic_cache(architecture: str, way: int) -> None:
    model = build(architecture)
    cache = filled(model)
    dense = logits(model, ids(CONTEXT, QUESTION, [5]))[:, -13:]
    with sparse_attention(model, all_keys()[way]) as session:
        question = logits(model, ids(QUESTION), cache)
        decode = logits(model, ids([5]), cache)
    assert torch.allclose(torch.cat([question, decode], 1), dense, atol=1e-5)
    full = sum(kind == "full_attention" for kind in getattr(model.config, "layer_types", None) or ["full_attention"] * 4)
    assert (session.calls, session.sparse_calls) == (8, 2 * full)
    assert session.density == pytest.approx(1.0)
    assert model.config._attn_implementation == "sdpa"


def test_generate_on_a_prefilled_cache_equals_dense_generate() -> None:
    model = build("llama")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids(CONTEXT, QUESTION), **options)
    with sparse_attention(model, all_keys()[1]) as session:
        assert torch.equal(model.generate(ids(CONTEXT, QUESTION), past_key_values=filled(model), **options), expected)
    assert session.sparse_calls == 4 * 8
    with sparse_attention(model, all_keys()[1]) as session:  # an empty cache: the prompt is prefilled densely
        assert torch.equal(model.generate(ids(CONTEXT, QUESTION), **options), expected)
    assert (session.calls, session.sparse_calls) == (4 * 8, 4 * 7)
    with sparse_attention(model, all_keys()[1], dense_prefill=False) as session:
        assert torch.equal(model.generate(ids(CONTEXT, QUESTION), **options), expected)
    assert session.sparse_calls == 4 * 8


@pytest.mark.parametrize("way", range(len(few_keys())))
def test_generate_gives_what_answer_gives(way: int) -> None:
    lm = wrap(build("llama"))
    found = answer(lm, prefill(lm, CONTEXT, 30), QUESTION, few_keys()[way], 9, seed=4)
    with sparse_attention(lm, few_keys()[way], seed=4) as session:
        out = lm.model.generate(ids(CONTEXT, QUESTION), past_key_values=filled(lm.model), max_new_tokens=9, do_sample=False)
    assert out[0, -9:].tolist() == found.token_ids
    assert session.density == pytest.approx(found.density, abs=1e-6)
    assert session.kv_fraction == pytest.approx(found.kv_fraction, abs=1e-6)


def test_generate_on_a_shared_prefix_cache() -> None:
    lm = wrap(build("llama"))
    prefilled = prefill(lm, CONTEXT, 30)
    found = answer(lm, prefilled, QUESTION, few_keys()[1], 9)
    with sparse_attention(lm, few_keys()[1]):
        out = lm.model.generate(ids(CONTEXT, QUESTION), past_key_values=prefilled.cache, max_new_tokens=9, do_sample=False)
    assert out[0, -9:].tolist() == found.token_ids
    prefilled.cache.rewind(len(CONTEXT))
    assert answer(lm, prefilled, QUESTION, few_keys()[1], 9).token_ids == found.token_ids


@pytest.mark.parametrize("way", [*range(4), None])
def test_left_padded_items_are_as_if_alone(way: int | None) -> None:
    model = build("llama")
    texts = [tokens(70), tokens(41, 5), tokens(66, 6)]
    width = max(map(len, texts))
    batch = torch.tensor([[0] * (width - len(t)) + t for t in texts])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts])
    chosen = attention() if way is None else few_keys()[way]
    question = torch.tensor([tokens(9, 7)] * 3)
    positions = mask.sum(1, keepdim=True) + torch.arange(9)
    cache = DynamicCache(config=model.config)
    logits(model, batch, cache, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    with sparse_attention(model, chosen, seed=2) as session:
        together = logits(
            model,
            question,
            cache,
            attention_mask=torch.cat([mask, torch.ones_like(question)], 1),
            position_ids=positions,
        )
    densities = []
    for i, text in enumerate(texts):
        alone_cache = filled(model, text)
        with sparse_attention(model, chosen, seed=2) as alone_session:
            alone = logits(model, question[i : i + 1], alone_cache)
        assert torch.allclose(together[i], alone[0], atol=1e-5)
        densities.append(alone_session.density)
    assert session.density == pytest.approx(sum(densities) / 3)


def test_padding_inside_a_question_is_never_attended_to() -> None:
    model = build("llama")
    cache = filled(model)
    padded = [0, 0, 0, *QUESTION]
    mask = torch.tensor([[1] * 70 + [0] * 3 + [1] * 12])
    positions = torch.tensor([[70, 70, 70, *range(70, 82)]])
    with sparse_attention(model, attention()):
        found = logits(model, ids(padded), cache, attention_mask=mask, position_ids=positions)
    assert torch.allclose(found[:, 3:], logits(model, ids(CONTEXT, QUESTION))[:, 70:], atol=1e-5)


@pytest.mark.parametrize("way", [None, 0, 1])
def test_static_cache_slots_that_are_empty_are_not_seen(way: int | None) -> None:
    """Trap 7: a StaticCache hands over all its slots."""
    model = build("llama")
    chosen = attention() if way is None else few_keys()[way]
    static = StaticCache(config=model.config, max_cache_len=128)
    logits(model, ids(CONTEXT), static)
    dynamic = filled(model)
    with sparse_attention(model, chosen):
        expected = [logits(model, ids(QUESTION), dynamic), logits(model, ids([7]), dynamic)]
    with sparse_attention(model, chosen) as session:
        found = [logits(model, ids(QUESTION), static), logits(model, ids([7]), static)]
    assert session.sparse_calls == 8
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    with sparse_attention(model, attention()):  # prefill into empty slots, then decode, all by generate
        out = model.generate(ids(CONTEXT), cache_implementation="static", max_new_tokens=5, do_sample=False)
    assert torch.equal(out, model.generate(ids(CONTEXT), max_new_tokens=5, do_sample=False))


class CodesConfig(MaskerConfig):
    """No fields."""


@register_masker(CodesConfig)
class Codes(Masker[CodesConfig]):
    """Attends to everything, and complains if its codes are not those of the keys it is given."""

    def encode(self, keys: torch.Tensor, fitted: Any, layer_idx: int) -> torch.Tensor:
        return keys.sum(-1)

    def fit(self, keys: torch.Tensor, allowed: Any, layer_idx: int) -> Any:
        return keys.shape[2]

    def select(self, inputs: Any, mask: Mask) -> Mask:
        fitted, codes = self.codes(inputs)
        assert fitted <= inputs.keys.shape[2] - inputs.queries.shape[2], "fitted on the question too"
        assert torch.equal(codes, inputs.keys.sum(-1)), "the codes are of other keys"
        return Mask.from_dense(inputs.allowed, inputs.shape[1], inputs.kv_heads)


@pytest.mark.parametrize("kind", ["grow", "crop", "another text", "beams", "static", "assisted"])
def test_what_maskers_remember_follows_the_cache(kind: str) -> None:
    model = build("llama")
    cache: Any = filled(model)
    dense = logits(model, ids(CONTEXT, QUESTION))[:, 70:]
    with sparse_attention(model, attention(CodesConfig())):
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=128)
            logits(model, ids(CONTEXT), cache)
        if kind == "beams":
            model.generate(ids(CONTEXT), num_beams=3, max_new_tokens=8, do_sample=False)
        if kind == "assisted":
            model.generate(ids(CONTEXT), prompt_lookup_num_tokens=3, max_new_tokens=8, do_sample=False)
        logits(model, ids(tokens(5, 9)), cache if kind != "another text" else filled(model, tokens(40, 3)))
        if kind != "static" and kind != "another text":
            cache.crop(-5)
        elif kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=128)
            logits(model, ids(CONTEXT), cache)
        found = (
            [logits(model, ids([token]), cache) for token in QUESTION]
            if kind == "grow"
            else [logits(model, ids(QUESTION), cache)]
        )
    assert torch.allclose(torch.cat(found, 1), dense, atol=1e-5)


# The traps of the interface, numbered as in the notes on transformers.


def test_trap_1_without_a_registered_mask_the_future_is_seen() -> None:
    model = build("llama")
    dense = logits(model, ids(CONTEXT, QUESTION))[:, 70:]

    def naive(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        assert mask is None
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    AttentionInterface.register("naive_for_test", naive)
    cache = filled(model)
    model.config._attn_implementation = "naive_for_test"
    assert (logits(model, ids(QUESTION), cache) - dense).abs().max() > 1e-2
    model.config._attn_implementation = "sdpa"
    cache = filled(model)
    with sparse_attention(model, attention()):
        assert torch.allclose(logits(model, ids(QUESTION), cache), dense, atol=1e-5)


def test_trap_1_no_mask_is_an_error_not_a_guess() -> None:
    model = build("llama")
    session_attention = attention()
    with sparse_attention(model, session_attention) as session, pytest.raises(UserError, match="no attention mask"):
        q = torch.zeros(1, 8, 2, 16)
        session.attend(model.model.layers[0].self_attn, q, q[:, :2], q[:, :2], None, None, {})


def test_trap_2_delegating_without_a_mask_slices_the_keys() -> None:
    model = build("llama")
    q, k = torch.randn(1, 8, 3, 16), torch.randn(1, 2, 20, 16)
    module = model.model.layers[0].self_attn
    sliced, _ = sdpa_attention_forward(module, q, k, k, None, scaling=0.25)
    mask = torch.ones(3, 20, dtype=torch.bool).tril(17)[None, None]
    right, _ = sdpa_attention_forward(module, q, k, k, mask, scaling=0.25)
    assert (sliced - right).abs().max() > 1e-2
    lm = wrap(build("gemma3"))  # whose window layers are dense on the filled cache, in both ways of running
    dense = logits(lm.model, ids(CONTEXT, QUESTION))[:, 70:]
    cache = filled(lm.model)
    with sparse_attention(lm, attention()):
        assert torch.allclose(logits(lm.model, ids(QUESTION), cache), dense, atol=1e-5)
    target = torch.tensor([*QUESTION[1:], 3])
    nll = torch.nn.functional.cross_entropy(dense[0], target)
    found = forced(lm, prefill(lm, CONTEXT, 20), QUESTION[:1], target.tolist(), attention())
    assert found.nll == pytest.approx(nll.item(), abs=1e-5)


def test_trap_3_dense_prefill_uses_transformers_own_name() -> None:
    lm = wrap(build("llama"))
    assert sparse_layers(lm) == [0, 1, 2, 3]  # which runs the model once
    expected = answer(lm, prefill(lm, CONTEXT, 20), QUESTION, None, 5).token_ids
    lm.dense_backend = "eager"  # any implementation that transformers knows by itself, as flash_attention_2 on a GPU
    seen = []
    hook = lm.model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(lm.model.config._attn_implementation))
    prefilled = prefill(lm, CONTEXT, 20)
    assert seen == ["eager"]
    assert answer(lm, prefilled, QUESTION, None, 5).token_ids == expected
    hook.remove()
    assert set(seen[1:]) == {LOCKSTEP} and lm.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", [PLUGIN, LOCKSTEP])
def test_trap_4_names_have_no_other_meaning(name: str) -> None:
    assert not any(word in name for word in ("flash", "sdpa", "flex", "paged", "eager", "|", "/"))
    model = build("llama")
    model.set_attn_implementation(name)  # transformers accepts it
    with pytest.raises(RuntimeError, match="works inside"):
        logits(model, ids(CONTEXT))


def test_trap_4_grouped_heads_attend_to_their_own_kv_head() -> None:
    lm = wrap(build("llama"))
    assert lm.model.config.num_attention_heads == 4 * lm.model.config.num_key_value_heads
    found = answer(lm, prefill(lm, CONTEXT, 20), QUESTION, attention(), 5)
    assert found.token_ids == lm.model.generate(ids(CONTEXT, QUESTION), max_new_tokens=5, do_sample=False)[0, -5:].tolist()


def test_trap_5_the_cache_is_not_copied_at_each_step() -> None:
    lm = wrap(build("llama"))
    prefilled = prefill(lm, CONTEXT, 30)
    places = [prefilled.context_keys(i)[0].data_ptr() for i in range(4)]
    held = prefilled.cache.nbytes()
    answer(lm, prefilled, QUESTION, few_keys()[0], 8)
    assert [prefilled.context_keys(i)[0].data_ptr() for i in range(4)] == places
    assert prefilled.cache.nbytes() == held == 4 * 2 * 2 * 16 * 100 * 4


def test_trap_6_rewinding_instead_of_crop() -> None:
    dynamic = filled(build("llama"))
    with pytest.raises(Exception):  # noqa: B017 - transformers' own, whichever it is
        dynamic.crop(10)
    lm = wrap(build("gemma3"))  # transformers' window layers forget what a rewind needs; ours keep it
    with torch.no_grad():
        prefilled = prefill(lm, CONTEXT, 40)
        first = logits(lm.model, ids(QUESTION), prefilled.cache)
        prefilled.cache.crop(-12)
        assert torch.equal(logits(lm.model, ids(QUESTION), prefilled.cache), first)
    with pytest.raises(ValueError, match="negative number"):
        prefilled.cache.crop(3)
    with pytest.raises(ValueError, match="cannot rewind"):
        prefilled.cache.rewind(500)


def test_trap_8_window_layers_are_dense_with_short_keys() -> None:
    model = build("gemma3")
    cache = filled(model)
    assert cache.layers[0].keys.shape[2] < cache.layers[1].keys.shape[2] == 70
    with sparse_attention(model, few_keys()[0]) as session:
        logits(model, ids(QUESTION), cache)
    assert (session.calls, session.sparse_calls) == (4, 2)


def test_trap_9_output_attentions_is_none() -> None:
    model = build("llama")
    with sparse_attention(model, attention()), torch.no_grad():
        out = model(ids(CONTEXT), output_attentions=True)
    assert not out.attentions or all(weights is None for weights in out.attentions)


def test_trap_10_grouped_keys_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations.sdpa_attention as module

    def never(*_: Any) -> None:
        raise AssertionError("keys were repeated for every query head")

    monkeypatch.setattr(module, "repeat_kv", never)
    lm = wrap(build("llama"))
    assert len(answer(lm, prefill(lm, CONTEXT, 20), QUESTION, None, 3).token_ids) == 3


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_dense_calls_of_a_session_are_not_cudnns(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN builds a graph for every new number of keys. Only a GPU asks for it, so what was allowed is looked at."""
    allowed = []

    def watch(*arguments: Any, **options: Any) -> Any:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return sdpa_attention_forward(*arguments, **options)

    monkeypatch.setattr(plugin, "sdpa_attention_forward", watch)
    model, before = build(architecture), torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        with sparse_attention(model, few_keys()[0]) as session, torch.no_grad():
            cache = DynamicCache(config=model.config)
            for part in (CONTEXT, QUESTION):
                model(ids(part), past_key_values=cache)
        assert session.sparse_calls and len(allowed) == session.calls - session.sparse_calls
        assert not any(allowed) and torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_model_that_stays_dense_is_an_error() -> None:
    model = build("llama")
    for layer in model.model.layers:  # code that does not look its attention up, as remote code may
        inner = layer.self_attn

        def stubborn(hidden_states: torch.Tensor, inner: Any = inner, **kwargs: Any) -> Any:
            name, inner.config._attn_implementation = inner.config._attn_implementation, "eager"
            try:
                return type(inner).forward(inner, hidden_states, **{**kwargs, "attention_mask": None})
            finally:
                inner.config._attn_implementation = name

        inner.forward = stubborn
    with sparse_attention(model, attention()), pytest.raises(UserError, match="stayed dense"):
        logits(model, ids(CONTEXT))
    with pytest.raises(UserError, match="0 of them used the attention"):
        prefill(wrap(model), CONTEXT, 5)


def test_switching_survives_an_error_inside() -> None:
    model = build("llama")
    with pytest.raises(RuntimeError, match="stop"), sparse_attention(model, attention()):
        assert model.config._attn_implementation == PLUGIN
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa" and not model._forward_hooks
    assert model.generation_config.disable_compile is not True


def test_cache_refuses_what_it_cannot_hold() -> None:
    cache = SharedPrefixCache(LlamaConfig(num_hidden_layers=1), 8)
    key = torch.zeros(1, 2, 5, 4)
    cache.update(key, key, 0)
    with pytest.raises(ValueError, match="room for 8 tokens, holds 5 and got 5 more"):
        cache.update(key, key, 0)
    with pytest.raises(ValueError, match="serves 1 rows but got 2"):
        cache.update(key.repeat(2, 1, 1, 1), key, 0)
    with pytest.raises(ValueError, match="no beams"):
        cache.reorder_cache(torch.tensor([0]))


def test_one_seed_an_item() -> None:
    model = build("llama")
    cache = filled(model)
    cache.batch_repeat_interleave(2)
    question = torch.tensor([QUESTION] * 2)
    with sparse_attention(model, few_keys()[3], seed=[1, 2]):
        two = logits(model, question, cache)
    cache.crop(-12)
    with sparse_attention(model, few_keys()[3], seed=1):
        one = logits(model, question, cache)
    assert torch.equal(one[0], two[0]) and torch.equal(one[0], one[1]) and not torch.equal(two[0], two[1])


def test_a_window_that_positions_never_reach_is_none() -> None:
    """Phi-3's configuration: a window as long as its positions, on every layer."""
    model = build("mistral_sliding")
    model.config.sliding_window = model.config.max_position_embeddings
    with sparse_attention(model, few_keys()[0]) as session:
        logits(model, ids(QUESTION), filled(model))
    assert session.sparse_calls == 4 and session.windowed_calls == 0
    assert sparse_layers(wrap(model)) == [0, 1, 2, 3]


def test_a_model_of_windows_only_is_not_dense_in_silence() -> None:
    model = build("mistral_sliding")
    with sparse_attention(model, few_keys()[0]), pytest.raises(UserError, match="sliding-window layers only"):
        logits(model, ids(QUESTION), filled(model))


def test_seeds_are_one_or_one_an_item() -> None:
    model = build("llama")
    with sparse_attention(model, few_keys()[0], seed=np.int64(3)):
        logits(model, ids(QUESTION), filled(model))
    with sparse_attention(model, few_keys()[0], seed=[1, 2]), pytest.raises(UserError, match="each of the 1 items, got 2"):
        logits(model, ids(QUESTION), filled(model))
