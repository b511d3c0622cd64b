"""Kinds of models, tiny and random: right under every way of asking them, or refused before weights are loaded."""

from __future__ import annotations

import pytest

from sparse_attention_hub.models import session
from sparse_attention_hub.models.survey import check_kind

RIGHT = [
    *("llama", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gpt_oss", "phi3 with longrope", "llama with dynamic RoPE"),
    *("deepseek_v3", "smollm3", "llama4_text", "qwen3_next", "jamba", "bamba", "gpt_neox"),
]
REFUSED = {
    "doge": "makes its own attention mask",
    "bloom": "in its own code",
    "mamba": "no attention layers",
    "bart": "encoder-decoder",
    "mistral with a window": "sliding-window layers only",
    "diffllama": "more than once per layer",
}


@pytest.mark.parametrize("kind", RIGHT)
def test_right(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(session._CHUNKS, "cpu", 64)
    finding = check_kind(kind)
    assert finding.status == "right", finding.why


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    finding = check_kind(kind)
    assert finding.status == "refused" and REFUSED[kind] in finding.why
