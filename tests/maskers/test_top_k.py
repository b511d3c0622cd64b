"""Choosing the highest keys: the same whether or not a replay's configurations share the sorted scores, ties included."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention_hub.maskers.inputs import AttentionInputs
from sparse_attention_hub.maskers.top_k import choose_top


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    keys=st.integers(4, 60),
    rows=st.integers(2, 4),
    values=st.sampled_from([1, 2, 5, 1000]),
    taken=st.sampled_from(["none", "ends", "scattered", "all"]),
    size=st.integers(1, 70),
)
def test_the_same_from_shared_scores(seed: int, keys: int, rows: int, values: int, taken: str, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-values, values + 1, (1, 4, rows, 1), generator=generator).float()
    stored = torch.randint(-values, values + 1, (1, 2, keys, 1), generator=generator).float()
    alone, shared = (AttentionInputs(queries, stored, stored, scaling=1.0) for _ in range(2))
    shared.viewers = 8
    chosen = torch.zeros((1, 1, rows, keys), dtype=torch.bool)
    if taken == "ends":
        chosen[..., : keys // 4] = chosen[..., -(keys // 4) :] = True
    elif taken == "scattered":
        chosen = torch.rand(chosen.shape, generator=generator) < 0.4
    elif taken == "all":
        chosen |= True
    residual = alone.allowed & ~chosen
    masks = [choose_top(inputs.scores(), residual, [size], inputs) for inputs in (alone, shared)]
    assert torch.equal(masks[0].chosen(), masks[1].chosen())
    for inputs, mask in zip((alone, shared), masks, strict=True):
        assert torch.equal(mask.counts(), mask.chosen().sum(-1))
        assert torch.equal(mask.counts(), residual.sum(-1).clamp(max=size).expand(-1, 4, -1))
        # By hand: the highest first, of equals the most recent.
        order = torch.arange(keys).flip(0)
        scores = inputs.scores().masked_fill(~residual, float("-inf"))[..., order]
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :size]
        wanted = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, order[best], True) & residual
        assert torch.equal(mask.chosen(), wanted)
