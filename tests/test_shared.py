"""Attention from shared exponentials: every way of weighing drawn keys gives what the logits give."""

from __future__ import annotations

import pytest
import torch

from sparse_attention_hub.mask import Mask
from sparse_attention_hub.maskers.inputs import AttentionInputs
from sparse_attention_hub.shared import LISTED_SHARE, _by_logits, attend_shared


@pytest.mark.parametrize("share", [LISTED_SHARE / 4, 2 * LISTED_SHARE])  # by lists, and all keys multiplied
@pytest.mark.parametrize("rate", [0.5, 0.01, 0.003, 0.0005])  # inverses below and above what a byte holds
def test_drawn_keys_weigh_their_inverse_rate(rate: float, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 4, 5, 8, generator=generator)
    keys, values = (torch.randn(1, 2, 300, 8, generator=generator) for _ in range(2))
    inputs = AttentionInputs(queries, keys, values)
    sure = (torch.rand(1, 4, 5, 300, generator=generator) < share) & inputs.allowed
    drawn = (torch.rand(1, 4, 5, 300, generator=generator) < share / 4) & inputs.allowed & ~sure
    mask = Mask.from_draw(sure, drawn, torch.full((1, 4, 5, 1), rate), 4, 2, (sure | drawn).sum(-1))
    for found, wanted in zip(attend_shared(mask, inputs), _by_logits(mask, inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
