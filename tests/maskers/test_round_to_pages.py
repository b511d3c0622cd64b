"""Rounding to pages: whole pages, shared as said, counted from an item's first allowed key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_attention_hub import (
    OracleTopKConfig,
    RandomSamplingMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    RoundToPagesConfig,
    SinkMaskerConfig,
)
from sparse_attention_hub.maskers.base import MaskerConfig
from sparse_attention_hub.testing import MaskerContract

HEADS, KV_HEADS, KEYS = 4, 2, 70


class TestRoundToPages(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return RoundToPagesConfig(16)

    def full_config(self) -> MaskerConfig | None:
        return None  # alone it chooses nothing


def chosen(configs: list[MaskerConfig], rows: int = 1, mask: Tensor | None = None) -> Tensor:
    """bool (H, rows, KEYS) of one item."""
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(1, HEADS, rows, 16, generator=generator)
    keys, values = (torch.randn(1, KV_HEADS, KEYS, 16, generator=generator) for _ in range(2))
    result = ResearchAttention(ResearchAttentionConfig(configs))(queries, keys, values, attention_mask=mask)
    return result.mask.inclusion_probability()[0] > 0


@pytest.mark.parametrize("share", ["head", "kv_head", "layer"])
@pytest.mark.parametrize("page", [1, 4, 16, 200])
@pytest.mark.parametrize("rows", [1, 9])
def test_the_pages_of_the_choice_and_no_other(page: int, share: str, rows: int) -> None:
    before = chosen([SinkMaskerConfig(2), OracleTopKConfig(5)], rows)
    after = chosen([SinkMaskerConfig(2), OracleTopKConfig(5), RoundToPagesConfig(page, share)], rows)
    together = {"head": 1, "kv_head": HEADS // KV_HEADS, "layer": HEADS}[share]
    for head in range(HEADS):
        first = head // together * together
        for row in range(rows):
            seen = KEYS - rows + row + 1
            wanted = before[first : first + together, row].any(0)
            pages = {key // page for key in range(KEYS) if wanted[key]}
            expected = [key // page in pages and key < seen for key in range(KEYS)]
            assert after[head, row].tolist() == expected


def test_pages_begin_at_the_first_allowed_key() -> None:
    padding = torch.arange(KEYS) >= 7
    after = chosen([SinkMaskerConfig(1), RoundToPagesConfig(8)], mask=padding[None, None, None])
    assert after[0, 0].nonzero().flatten().tolist() == list(range(7, 15))


def test_it_is_refused_behind_a_sampler() -> None:
    with pytest.raises(ValueError, match="a sampling masker must come last"):
        ResearchAttention(ResearchAttentionConfig([RandomSamplingMaskerConfig(0.1), RoundToPagesConfig()]))


@pytest.mark.parametrize(
    ("fields", "message"), [((0,), "page_size must be"), ((16, "batch"), "share must be one of head, kv_head")]
)
def test_bad_fields(fields: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoundToPagesConfig(*fields)  # type: ignore[arg-type]
