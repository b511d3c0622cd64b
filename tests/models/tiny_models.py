"""Tiny random models of the architectures that must work, a tokenizer of letters, and attentions to ask them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sparse_attention_hub import (
    LocalMaskerConfig,
    OracleTopKConfig,
    RandomSamplingMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    SinkMaskerConfig,
)
from sparse_attention_hub.models import Forced, LanguageModel, Prefilled, forced_many

VOCABULARY = 101
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    # Larger than usual, so that attention is peaked and a wrong mask shows in the output.
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = 24
ARCHITECTURES = ["llama", "qwen3", "mistral", "mistral_sliding", "gemma3"]


class Letters:
    """The least a tokenizer must do."""

    eos_token_id: int | None = None

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(200 + i) for i in ids if not (skip_special_tokens and i == self.eos_token_id))


def build(architecture: str, seed: int = 0, **sizes: Any) -> Any:
    """A tiny random model in float32 on CPU. sizes: of a Llama, others than SIZES."""
    torch.manual_seed(seed)
    if architecture == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}))
    elif architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    elif architecture == "mistral":
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))
    elif architecture == "mistral_sliding":
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW))
    else:
        kinds = ["sliding_attention", "full_attention"] * 2
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=WINDOW, layer_types=kinds))
    return model.eval()


def wrap(model: Any) -> LanguageModel:
    return LanguageModel.wrap(model, Letters(), name="tiny")


def tokens(count: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (count,), generator=generator).tolist()


def attention(*maskers: Any) -> ResearchAttention:
    return ResearchAttention(ResearchAttentionConfig(masker_configs=list(maskers)))


def all_keys() -> list[ResearchAttention]:
    """Pipelines that select every key, each in its own way."""
    return [
        attention(),
        attention(SinkMaskerConfig(sink_size=1.0)),
        attention(OracleTopKConfig(heavy_size=1.0)),
        attention(SinkMaskerConfig(sink_size=2), RandomSamplingMaskerConfig(sampling_rate=1.0)),
    ]


def few_keys() -> list[ResearchAttention]:
    """Pipelines that leave most keys out."""
    sink, local = SinkMaskerConfig(sink_size=2), LocalMaskerConfig(window_size=4)
    return [
        attention(sink, local),
        attention(sink, local, OracleTopKConfig(heavy_size=0.1)),
        attention(OracleTopKConfig(heavy_size=5)),
        attention(sink, local, RandomSamplingMaskerConfig(sampling_rate=0.2)),
    ]


def forced(
    lm: LanguageModel,
    prefilled: Prefilled,
    question: list[int],
    answer: list[int],
    attention: ResearchAttention | None,
    *,
    recorder: Any = None,
    **options: Any,
) -> Forced:
    """How likely an answer is under one attention."""
    return forced_many(lm, prefilled, question, answer, [attention], recorders=[recorder], **options)[0]


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory that tensors take at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
