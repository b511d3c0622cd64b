"""The same sets as kvpress on the same tensors: recorded ones always, and its own where it is installed.

`uv run --group oracle python tests/maskers/test_kvpress.py` records them again.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sparse_attention_hub as hub
from sparse_attention_hub import AttentionInputs, ContextSummary, ResearchAttention, ResearchAttentionConfig

RECORDED = Path(__file__).parents[1] / "data" / "kvpress_sets.json"
N, HEADS, KV_HEADS, DIM, WINDOW, KERNEL = 160, 8, 2, 16, 8, 5
SIZES = (20, 60)
METHODS = {
    "snap_kv": lambda size: hub.SnapKVConfig(size, window_size=WINDOW, kernel_size=KERNEL),
    "expected_attention": hub.ExpectedAttentionConfig,
    "key_diff": hub.KeyDiffConfig,
    "knorm": hub.KnormConfig,
    "tova": hub.TOVAConfig,
}


def factors(positions: np.ndarray) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a Llama's rotary embedding: (n, DIM) each."""
    angles = positions[:, None] * 10000.0 ** (-np.arange(0, DIM, 2) / DIM)
    return tuple(torch.tensor(f(np.concatenate([angles, angles], 1)), dtype=torch.float32) for f in (np.cos, np.sin))  # type: ignore[return-value]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1) * sin


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """Queries (2, HEADS, N, DIM) without rotary embedding, and keys and values (2, KV_HEADS, N, DIM) as a cache holds them."""
    chance = np.random.RandomState(7)  # its numbers are the same in every version
    q, k, v = (torch.tensor(chance.standard_normal((2, h, N, DIM)), dtype=torch.float32) for h in (HEADS, KV_HEADS, KV_HEADS))
    mean = torch.tensor(chance.standard_normal((1, HEADS, 1, DIM)), dtype=torch.float32)
    return q + mean, rotate(k + mean[:, ::4], *factors(np.arange(N))), v


def our_sets(name: str, size: int) -> list[list[list[int]]]:
    plain, k, v = tensors()
    attention = ResearchAttention(ResearchAttentionConfig([METHODS[name](size)]))
    summary = ContextSummary(attention.observes)
    cos, sin = (part.mean(0, keepdim=True) for part in factors(np.arange(N, N + 512)))
    summary.add(AttentionInputs(rotate(plain, *factors(np.arange(N))), k, v), plain, rotate(torch.eye(DIM), cos, sin).T)
    state = attention.new_state()
    state.observe(0, summary)
    attention.prepare(k, 0, state)
    later = [torch.cat([part, part[:, :, :1]], 2) for part in (k, v)]
    p = attention(plain[:, :, :1], *later, state=state).mask.inclusion_probability()[:, :: HEADS // KV_HEADS, 0, :N]
    return p.nonzero()[:, 2].view(2, KV_HEADS, size).tolist()  # type: ignore[no-any-return]


def their_sets(name: str, size: int) -> list[list[list[int]]]:
    import kvpress
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    plain, k, v = tensors()
    press = {
        "snap_kv": kvpress.SnapKVPress(window_size=WINDOW, kernel_size=KERNEL),
        "expected_attention": kvpress.ExpectedAttentionPress(),
        "key_diff": kvpress.KeyDiffPress(),
        "knorm": kvpress.KnormPress(),
        "tova": kvpress.TOVAPress(),
    }[name]
    config = LlamaConfig(hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM)
    layer: Any = SimpleNamespace(
        config=config, head_dim=DIM, q_proj=lambda hidden: hidden, rotary_emb=LlamaRotaryEmbedding(config)
    )
    hidden = plain.transpose(1, 2).reshape(2, N, HEADS * DIM)
    cos, sin = factors(np.arange(N))
    scores = press.score(layer, hidden, k, v, None, {"position_embeddings": (cos[None], sin[None])})
    return scores.topk(size, dim=-1).indices.sort().values.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", METHODS)
def test_the_sets_are_those_that_kvpress_gave(name: str, size: int) -> None:
    assert our_sets(name, size) == json.loads(RECORDED.read_text())[name][str(size)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", METHODS)
def test_the_sets_are_those_of_kvpress(name: str, size: int) -> None:
    pytest.importorskip("kvpress", reason="kvpress is not installed: uv sync --group oracle installs it")
    assert our_sets(name, size) == their_sets(name, size)


if __name__ == "__main__":
    recorded = {name: {str(size): their_sets(name, size) for size in SIZES} for name in METHODS}
    RECORDED.write_text(json.dumps(recorded, separators=(",", ":")) + "\n")
