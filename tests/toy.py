"""A toy task and its configurations, which the tests of Phase 2 run on a tiny random model in seconds."""

from __future__ import annotations

import random
import string
from typing import Any

import sparse_attention_hub as hub
from benchmark.settings import SparseConfig
from benchmark.tasks.base import Sample, SampleRequest, Task, TaskDescription


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

    def named(name: str, entries: list[Any]) -> SparseConfig:
        return SparseConfig(name, hub.ResearchAttentionConfig(entries), tuple(type(entry) for entry in entries))

    ends = [hub.SinkMaskerConfig(sink_size=4), hub.LocalMaskerConfig(window_size=16)]
    return [
        SparseConfig("dense", None, None),
        named("sink_local_25pct", ends),
        named("sink_local_random_sampling_25pct", [*ends, hub.RandomSamplingMaskerConfig(sampling_rate=0.1)]),
    ]
