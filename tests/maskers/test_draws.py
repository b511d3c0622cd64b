"""Draws in the shared random order: every way of making one gives the same keys."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention_hub.maskers.draws import OrderedResidual
from sparse_attention_hub.maskers.inputs import AttentionInputs


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(2, 6),
    keys=st.integers(8, 90),
    share=st.floats(0.05, 1.0),
    want=st.floats(0.0, 1.0),
    seed=st.integers(0, 99),
)
def test_a_draw_is_the_same_as_a_list_and_as_flags(rows: int, keys: int, share: float, want: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = AttentionInputs(*(torch.randn(2, h, n, 4, generator=generator) for h, n in ((4, rows), (2, keys), (2, keys))))
    order = OrderedResidual(inputs, (torch.rand(2, 1, rows, keys, generator=generator) < share) & inputs.allowed)
    sizes = (order.left * want).long()
    indices, meant = order.listed(sizes)
    flags = torch.zeros(2, 2, rows, keys + 1, dtype=torch.bool)
    flags.scatter_(-1, indices.masked_fill(~meant, keys), True)
    assert torch.equal(flags[..., :keys], order.first(sizes))
    assert torch.equal(meant.sum(-1), sizes)
