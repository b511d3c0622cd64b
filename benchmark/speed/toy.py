"""A tiny random model and a toy task, which the fault run and the tests of Phase 2 benchmark in seconds."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

from benchmark.settings import SparseConfig
from benchmark.tasks.base import Sample, SampleRequest, Task, TaskDescription


def save_tiny_model(folder: Path, *, layers: int = 2, width: int = 32, seed: int = 0) -> Path:
    """Save a random Llama (4 heads, 2 kv heads) and a tokenizer of single characters with BOS and EOS; returns the folder."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


class ToyTask(Task):
    """Count letters in a random text; two questions on each context. overlap: share of the reference's characters that are in
    the answer. length: of the answer, over 10."""

    name = "toy/count"
    metric = "overlap"
    use_chat_template = False

    def __init__(self, total: int = 20, context: int = 160, answer: int = 12, name: str = "toy/count") -> None:
        self.total, self.context, self.answer, self.name = total, context, answer, name

    @property
    def description(self) -> TaskDescription:
        return TaskDescription("generated", self.metric, self.answer, self.total)

    def samples(self, request: SampleRequest) -> list[Sample]:
        count = self.total if request.max_samples is None else min(self.total, request.max_samples)
        return [self._sample(f"{request.seed} {request.split} {index // 2}", index) for index in range(count)]

    def _sample(self, seed: str, index: int) -> Sample:
        context = "".join(random.Random(seed).choices(string.ascii_lowercase, k=self.context))
        letter = "ab"[index % 2]
        references = [str(context.count(letter))]
        return Sample(
            sample_id=f"{self.name}:{index}",
            task=self.name,
            context=context,
            question=f"\nHow many {letter}?",
            answer_prefix=" It is",
            references=references,
            max_new_tokens=self.answer,
            columns={"context": context, "letter": letter, "answers": references, "note": 'a "quoted"\nline \\n'},
        )

    def score_answer(self, prediction: str, references: Any, all_classes: list[str] | None = None) -> dict[str, float]:
        wanted = set(references[0])
        return {"overlap": len(wanted & set(prediction)) / len(wanted), "length": min(1.0, len(prediction) / 10)}

    def aggregate(self, scores: list[dict[str, float]], samples: list[Sample]) -> dict[str, Any]:
        return {"answered": len(scores)}


def toy_configs() -> list[SparseConfig]:
    """Dense, a deterministic and a sampling configuration."""
    import sparse_attention_hub as hub

    def named(name: str, entries: list[Any]) -> SparseConfig:
        return SparseConfig(name, hub.ResearchAttentionConfig(entries), tuple(type(entry) for entry in entries))

    ends = [hub.SinkMaskerConfig(sink_size=4), hub.LocalMaskerConfig(window_size=16)]
    return [
        SparseConfig("dense", None, None),
        named("sink_local_25pct", ends),
        named("sink_local_random_sampling_25pct", [*ends, hub.RandomSamplingMaskerConfig(sampling_rate=0.1)]),
    ]
