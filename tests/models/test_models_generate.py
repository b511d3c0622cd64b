"""A configuration from a file under transformers' own `generate` and pipelines: batches, padding, chats, sampling, threads."""

from __future__ import annotations

import contextvars
import json
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, tokens, wrap
from transformers import DynamicCache, TextIteratorStreamer, pipeline

from sparse_attention_hub import (
    H2OConfig,
    KnormConfig,
    LocalMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SnapKVConfig,
)
from sparse_attention_hub.maskers.eviction import Eviction
from sparse_attention_hub.maskers.pq_cache import PQCacheMasker
from sparse_attention_hub.models import EMBEDDED_MODEL, answer_many, load_tokenizer, prefill, sparse_attention

SINK, LOCAL = ("SinkMaskerConfig", {"sink_size": 2}), ("LocalMaskerConfig", {"window_size": 4})
PQ = {"pq_group_factor": 4, "pq_bits": 3, "kmeans_iter": 3, "init_offset": 0, "metric": "euclidean"}
METHODS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "top_k": [SINK, LOCAL, ("OracleTopKConfig", {"heavy_size": 0.1})],
    "quest_pages": [
        SINK,
        LOCAL,
        ("QuestTopKMaskerConfig", {"heavy_size": 0.2, "page_size": 4}),
        ("RoundToPagesConfig", {"page_size": 4}),
    ],
    "pq_cache": [SINK, LOCAL, ("PQCacheConfig", {"heavy_size": 0.1, **PQ})],
    "random": [SINK, LOCAL, ("RandomSamplingMaskerConfig", {"sampling_rate": 0.2})],
    "adaptive": [SINK, ("AdaptiveSamplingMaskerConfig", dict(base_rate_sampling=0.1, epsilon=0.3, delta=0.3, init_offset=0, local_offset=0))],
}  # fmt: skip


def found(folder: Path, method: str) -> ResearchAttention:
    """The attention of a method, by way of a file as a search writes it."""
    maskers = [{"type": name, "params": params} for name, params in METHODS[method]]
    file = folder / f"{method}.json"
    file.write_text(json.dumps({"sparse_config": {"type": "ResearchAttentionConfig", "masker_configs": maskers}}))
    return ResearchAttention.from_file(file)


GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def padded(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and their attention mask."""
    width = max(map(len, texts))
    rows = [([0] * (width - len(text)) + text, [0] * (width - len(text)) + [1] * len(text)) for text in texts]
    ids, mask = (torch.tensor(part) for part in zip(*rows, strict=True))
    return ids, mask


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_left_padded_batches_generate_what_each_item_generates_alone(method: str, prefill: str, tmp_path: Path) -> None:
    model, attention = build("llama"), found(tmp_path, method)
    texts = [tokens(70), tokens(31, 5), tokens(66, 6)]
    ids, mask = padded(texts)
    options = {"seed": 3, "dense_prefill": prefill == "dense"}
    with sparse_attention(model, attention, **options) as session:  # type: ignore[arg-type]
        together = model.generate(ids, attention_mask=mask, **GREEDY)
    assert session.sparse_calls and session.density is not None and session.density < 0.9
    for item, text in zip(together[:, ids.shape[1] :], texts, strict=True):
        with sparse_attention(model, attention, **options):  # type: ignore[arg-type]
            alone = model.generate(torch.tensor([text]), **GREEDY)
        assert item.tolist() == alone[0, len(text) :].tolist()


def chat(model: Any, attention: ResearchAttention, one_session: bool) -> list[int]:
    """The text of three turns on one cache, in one session or one per turn; the user takes back some of the first answer."""
    cache, text = DynamicCache(config=model.config), tokens(60)

    def turn(number: int, text: list[int]) -> list[int]:
        whole: list[int] = model.generate(torch.tensor([text + tokens(9, number)]), past_key_values=cache, **GREEDY)[0].tolist()
        assert cache.get_seq_length() == len(whole) - 1
        if number > 0:
            return whole
        cache.crop(-3)
        return whole[:-3]

    with sparse_attention(model, attention, seed=1) if one_session else nullcontext() as session:
        for number in range(3):
            with nullcontext(session) if one_session else sparse_attention(model, attention, seed=1) as own:
                before = own.sparse_calls
                text = turn(number, text)
                assert own.sparse_calls > before
    return text


@pytest.mark.parametrize("method", [name for name in METHODS if name != "pq_cache"])
def test_a_chat_answers_as_if_all_was_learned_at_once(method: str, tmp_path: Path) -> None:
    """These methods' states follow from the keys alone: turns in sessions of their own, which learn all keys at once, give the
    same text."""
    model, attention = build("llama"), found(tmp_path, method)
    assert chat(model, attention, one_session=True) == chat(model, attention, one_session=False)


def test_a_chat_fits_once_and_codes_each_key_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, attention = build("llama"), found(tmp_path, "pq_cache")
    fitted, coded = [], []
    fit, encode = PQCacheMasker.fit, PQCacheMasker.encode

    def count_fit(self: Any, keys: torch.Tensor, *rest: Any) -> Any:
        fitted.append(keys.shape[2])
        return fit(self, keys, *rest)

    def count_encode(self: Any, keys: torch.Tensor, *rest: Any) -> torch.Tensor:
        coded.append(keys.shape[2])
        return encode(self, keys, *rest)

    monkeypatch.setattr(PQCacheMasker, "fit", count_fit)
    monkeypatch.setattr(PQCacheMasker, "encode", count_encode)
    text = chat(model, attention, one_session=True)
    layers = model.config.num_hidden_layers
    assert fitted == [69] * layers, "on the first turn's text"
    assert sum(coded) == layers * (len(text) - 1 + 3), "3 keys were taken back and others came in their place"


def test_sampled_tokens_are_those_of_dense_attention_where_every_key_is_drawn(tmp_path: Path) -> None:
    """Maskers leave torch's global random numbers alone."""
    model = build("llama")
    file = tmp_path / "all.json"
    every = {"type": "RandomSamplingMaskerConfig", "params": {"sampling_rate": 1.0}}
    file.write_text(json.dumps({"sparse_config": {"masker_configs": [every]}}))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "top_p": 0.95, "pad_token_id": 0}
    ids = torch.tensor([tokens(70)])
    torch.manual_seed(5)
    dense = model.generate(ids, num_return_sequences=3, **options)
    with sparse_attention(model, ResearchAttention.from_file(file)) as session:
        torch.manual_seed(5)
        sparse = model.generate(ids, num_return_sequences=3, **options)
    assert torch.equal(sparse, dense) and len({tuple(row) for row in dense.tolist()}) == 3
    assert session.density == pytest.approx(1.0)


@pytest.mark.parametrize("method", METHODS)
def test_sampling_is_reproducible(method: str, tmp_path: Path) -> None:
    model, attention, ids = build("llama"), found(tmp_path, method), torch.tensor([tokens(70)])
    answers = []
    for _ in range(2):
        torch.manual_seed(5)
        with sparse_attention(model, attention, seed=7) as session:
            answers.append(model.generate(ids, max_new_tokens=10, do_sample=True, num_return_sequences=2, pad_token_id=0))
        assert session.density is not None and session.density < 0.9
    assert torch.equal(*answers) and answers[0].shape == (2, 80)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def speaker(tokenizer: Any) -> Any:
    """A tiny model with the vocabulary of a real tokenizer."""
    model = build("llama", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 3])
def test_inside_a_pipeline(method: str, batch: int, speaker: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Prompts of different lengths through a text-generation pipeline, made before the `with`; texts as of `generate`."""
    attention = found(tmp_path, method)
    prompts = ["The sea is calm. " * 9, "One two three. " * 3, "A long day begins with a cup of tea. " * 6]
    speak = pipeline("text-generation", model=speaker, tokenizer=tokenizer)
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with sparse_attention(speaker, attention):
            expected.append(tokenizer.decode(speaker.generate(ids, **GREEDY)[0, ids.shape[1] :], skip_special_tokens=True))
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        with sparse_attention(speaker, attention) as session:
            answers = speak(prompts, batch_size=batch, return_full_text=False, max_new_tokens=8, do_sample=False)
    finally:
        tokenizer.padding_side = side
    assert [answer[0]["generated_text"] for answer in answers] == expected
    assert session.sparse_calls and speaker.config._attn_implementation == "sdpa"


def test_a_pipeline_takes_chats(speaker: Any, tokenizer: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "The sea is calm. " * 9 + "How is the sea?"}]
    speak = pipeline("text-generation", model=speaker, tokenizer=tokenizer)
    with sparse_attention(speaker, found(tmp_path, "top_k")) as session:
        (answer,) = speak(messages, max_new_tokens=8, do_sample=False)
    assert answer["generated_text"][-1]["role"] == "assistant" and session.sparse_calls


def test_streaming_from_a_thread_takes_the_context_along(speaker: Any, tokenizer: Any, tmp_path: Path) -> None:
    ids = tokenizer("The sea is calm. " * 9, return_tensors="pt").input_ids
    with sparse_attention(speaker, found(tmp_path, "top_k")) as session:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(speaker.generate, ids), kwargs={**GREEDY, "streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text and session.sparse_calls == 4 * 7


@pytest.mark.parametrize("maskers", [[SnapKVConfig(0.1, 4, 3)], [LocalMaskerConfig(4), H2OConfig(0.1)], [KnormConfig(0.2)]])
def test_with_the_contexts_length_a_prompt_is_answered_as_by_the_benchmark(maskers: list[Any]) -> None:
    """Under `decode`, context and question are dense, and what is learned is learned of the context."""
    lm, way = wrap(build("llama")), ResearchAttention(ResearchAttentionConfig(maskers))
    context, question = tokens(80), tokens(9, 4)
    prefilled = prefill(lm, context, 40, way.observes)
    (expected,) = answer_many(lm, prefilled, question, [way], 8, sparse_from="decode")
    with sparse_attention(lm, way, context_length=len(context)) as session:
        found = lm.model.generate(torch.tensor([context + question]), **GREEDY)[0, len(context + question) :].tolist()
    assert found == expected.token_ids and session.density == pytest.approx(expected.density)
    with sparse_attention(lm, way) as session:  # learned of the question, too
        lm.model.generate(torch.tensor([context + question]), **GREEDY)
    assert session.density != pytest.approx(expected.density)


def test_a_beam_that_moves_keeps_what_was_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[int] = []
    rank = Eviction._rank
    monkeypatch.setattr(Eviction, "_rank", lambda self, keys, *rest: (fits.append(keys.shape[2]), rank(self, keys, *rest))[1])
    lm, way = wrap(build("llama")), ResearchAttention(ResearchAttentionConfig([KnormConfig(0.2)]))
    with sparse_attention(lm, way):
        lm.model.generate(torch.tensor([tokens(60)]), num_beams=3, **GREEDY)
    assert fits == [60] * (3 * lm.num_layers), "one fit for each layer and beam, of the prompt"


def test_what_is_no_attention_is_told() -> None:
    config = ResearchAttentionConfig([KnormConfig(0.2)])
    with (
        pytest.raises(TypeError, match="got ResearchAttentionConfig: ResearchAttention.config. makes one"),
        sparse_attention(build("llama"), config),
    ):
        pass
    lm = wrap(build("llama"))
    with pytest.raises(TypeError, match="attentions must be a list"):
        answer_many(lm, prefill(lm, tokens(20), 20), tokens(3), ResearchAttention(config), 4)  # type: ignore[arg-type]
