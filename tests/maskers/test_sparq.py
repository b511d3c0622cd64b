"""SparQ: keys by the channels in which the query is largest, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_attention_hub import ResearchAttention, ResearchAttentionConfig, SinkMaskerConfig, SparqConfig
from sparse_attention_hub.testing import MaskerContract


class TestSparq(MaskerContract):
    def make_config(self) -> SparqConfig:
        return SparqConfig(heavy_size=0.1, channels=8)


class TestSparqFraction(MaskerContract):
    def make_config(self) -> SparqConfig:
        return SparqConfig(heavy_size=20, channels=0.5)


def expected_shares(queries: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """The paper's first step for the queries (G, D) of one kv head and its keys (N, D): the `count` channels of largest |q|,
    summed over the group; for each query softmax(q_i . k_i / sqrt(D |q_i| / |q|)), by 1-norms; summed over the group."""
    channels = np.argsort(-np.abs(queries).sum(0))[:count]
    shares = np.zeros(len(keys))
    for query in queries:
        covered = np.abs(query[channels]).sum() / np.abs(query).sum()
        scores = keys[:, channels] @ query[channels] / np.sqrt(len(query) * covered)
        weights = np.exp(scores - scores.max())
        shares += weights / weights.sum()
    return shares


def tensors(n: int, rows: int = 1, batch: int = 1, kv_heads: int = 2) -> list[Tensor]:
    """4 query heads of 16 channels."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 4, rows, 16), (batch, kv_heads, n, 16), (batch, kv_heads, n, 16)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def attention(heavy_size: int | float, channels: int | float) -> ResearchAttention:
    return ResearchAttention(ResearchAttentionConfig([SparqConfig(heavy_size, channels)]))


def check(chosen: Tensor, queries: Tensor, keys: Tensor, count: int, size: int) -> None:
    """Chosen (H, N) are the expected keys of one row's queries (H, D) and keys (Hkv, N, D)."""
    group = queries.shape[0] // keys.shape[0]
    for head in range(queries.shape[0]):
        first = head // group * group
        shares = expected_shares(queries[first : first + group].double().numpy(), keys[head // group].double().numpy(), count)
        assert set(chosen[head].nonzero()[:, 0].tolist()) == set(np.argsort(-shares)[:size].tolist())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 4, 16])
def test_selection_is_the_definition(channels: int, kv_heads: int) -> None:
    q, k, v = tensors(101, kv_heads=kv_heads)
    chosen = attention(12, channels)(q, k, v).mask.inclusion_probability()[0, :, 0]
    check(chosen, q[0, :, 0], k[0], channels, 12)


def test_each_row_has_its_own_channels_and_sees_no_later_key() -> None:
    q, k, v = tensors(60, rows=5)
    chosen = attention(9, 4)(q, k, v).mask.inclusion_probability()[0]
    for row in range(5):
        seen = 60 - 4 + row
        assert bool((chosen[:, row, seen:] == 0).all())
        check(chosen[:, row, :seen], q[0, :, row], k[0, :, :seen], 4, 9)


def test_a_batch_with_padding_is_its_items_alone() -> None:
    q, k, v = tensors(90, batch=3)
    padding = [0, 13, 40]
    allowed = torch.arange(90) >= torch.tensor(padding).unsqueeze(-1)
    k.masked_fill_(~allowed[:, None, :, None], float("nan"))
    chosen = attention(11, 4)(q, k, v, attention_mask=allowed[:, None, None]).mask.inclusion_probability()[:, :, 0]
    for item, start in enumerate(padding):
        assert bool((chosen[item, :, :start] == 0).all())
        check(chosen[item, :, start:], q[item, :, 0], k[item, :, start:], 4, 11)


def test_one_set_for_the_query_heads_of_a_kv_head() -> None:
    assert attention(12, 4)(*tensors(101)).mask.shared_heads == 2


def test_keys_are_chosen_beside_those_of_earlier_maskers() -> None:
    q, k, v = tensors(101)
    pipeline = ResearchAttention(ResearchAttentionConfig([SinkMaskerConfig(10), SparqConfig(12, 4)]))
    chosen = pipeline(q, k, v).mask.inclusion_probability()[0, :, 0]
    assert bool((chosen[:, :10] == 1).all()) and bool((chosen.sum(-1) == 22).all())
    check(chosen[:, 10:], q[0, :, 0], k[0, :, 10:], 4, 12)


def test_bytes_read_are_those_of_the_kept_channels() -> None:
    for channels in (4, 0.25):
        assert attention(16, channels)(*tensors(160)).kv_fraction == pytest.approx(0.1 + 4 / 32)
    assert attention(16, 99)(*tensors(160)).kv_fraction == pytest.approx(0.1 + 0.5), "more channels than there are"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heavy_size": -1}, "heavy_size must be > 0, got -1"),
        ({"channels": 0}, "channels must be > 0, got 0"),
        ({"channels": 1.5}, r"channels must be > 0; as a fraction in \(0, 1\], got 1.5"),
    ],
)
def test_bad_configs(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparqConfig(**({"heavy_size": 64, "channels": 8} | fields))  # type: ignore[arg-type]
