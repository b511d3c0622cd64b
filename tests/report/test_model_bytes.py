"""KV bytes of a whole model: layers with a sliding window stay dense and read the keys of their window."""

from __future__ import annotations

import pytest

from benchmark.execution.answer_sample import LoadedModel, Prefix, answer_sample
from benchmark.execution.messages import Request
from benchmark.settings import Settings
from benchmark.tasks.base import Prompt, Sample
from sparse_attention_hub import OracleTopKConfig, ResearchAttention, ResearchAttentionConfig, SinkMaskerConfig
from sparse_attention_hub.models import LanguageModel
from tests.models.tiny_models import WINDOW, Letters, build

CONTEXT, QUESTION, NEW = 200, 5, 3


@pytest.mark.parametrize(("architecture", "sparse"), [("llama", 4), ("gemma3", 2)])
def test_the_share_of_all_layers(architecture: str, sparse: int) -> None:
    lm = LanguageModel.wrap(build(architecture), Letters(), name=architecture)
    attention = ResearchAttention(ResearchAttentionConfig([SinkMaskerConfig(4), OracleTopKConfig(8)]))
    loaded = LoadedModel(
        (architecture,), lm, Settings((architecture,), ("t",), device="cpu"), attentions={"d": None, "s": attention}
    )
    sample = Sample("t:0", "t", "", "", "", [], NEW)
    prompt = Prompt([2 + i % 90 for i in range(CONTEXT)], [3] * QUESTION, 0)
    line = answer_sample(Request(sample, "h", 0, NEW, ("d", "s")), prompt, loaded, Prefix(lm), 16)
    dense, found = line.answers["d"], line.answers["s"]
    assert (line.layers, line.sparse_layers) == (4, sparse) and dense.model_kv_fraction == 1.0
    assert found.kv_fraction is not None and 0 < found.kv_fraction < 1
    keys = CONTEXT + QUESTION + NEW
    window = (4 - sparse) * WINDOW
    assert found.model_kv_fraction == pytest.approx((found.kv_fraction * sparse * keys + window) / (sparse * keys + window))
