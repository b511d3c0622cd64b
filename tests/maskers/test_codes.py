"""Compiled loops and torch make the same bits and choose the same keys."""

from __future__ import annotations

import pytest
import torch

from sparse_attention_hub import MagicPigConfig
from sparse_attention_hub.maskers.codes import pack_bits, pack_levels, pseudo_quantise, score_bits, unpack_levels
from sparse_attention_hub.maskers.magic_pig import MagicPigMasker


@pytest.mark.parametrize("count", [1, 8, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_packing(count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = torch.rand(3, 5, count, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_bits(bits, dtype)
    monkeypatch.setattr("sparse_attention_hub.lists.HAS_NUMBA", False)
    assert packed.dtype == dtype and torch.equal(packed, pack_bits(bits, dtype))


@pytest.mark.parametrize("networks", [1, 4])
@pytest.mark.parametrize("words", [1, 3])
def test_scores_of_bits(networks: int, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-(2**31), 2**31, (2, 3, 4, 2, words), generator=generator).int()
    keys = torch.randint(-(2**31), 2**31, (2, 3, 50, networks, words), generator=generator).int()
    scores = score_bits(queries, keys)
    monkeypatch.setattr("sparse_attention_hub.lists.HAS_NUMBA", False)
    assert scores.shape == (2, 3, 4, 2, 50) and torch.equal(scores, score_bits(queries, keys))


@pytest.mark.parametrize(("lsh_l", "lsh_k", "matches"), [(20, 4, 1), (300, 2, 2), (8, 11, 1), (6, 17, 1), (4, 33, 1)])
def test_buckets(lsh_l: int, lsh_k: int, matches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    masker = MagicPigMasker(MagicPigConfig(lsh_l, lsh_k, min_matches=matches))
    keys = torch.randn(2, 2, 70, 16, generator=torch.Generator().manual_seed(0))
    signatures = masker.encode(keys, masker.fit(keys, None, 0), 0)
    queries = signatures[:, :, 20:26].reshape(2, 4, 3, -1)
    hits = masker._hits(queries, signatures)
    monkeypatch.setattr("sparse_attention_hub.lists.HAS_NUMBA", False)
    assert bool(hits.any()) and torch.equal(hits, masker._hits(queries, signatures))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8, 9, 15])
@pytest.mark.parametrize("channels", [1, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_are_packed_and_come_back(bits: int, channels: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 40, 4, channels, generator=torch.Generator().manual_seed(bits)).to(dtype)
    x[0, 0, 0] = 0.5  # no spread
    codes = pack_levels(x, bits)
    assert torch.equal(unpack_levels(codes[:, :, 3:], 4, channels, bits), pseudo_quantise(x, bits)[:, :, 3:])
    width = next(width for width in (1, 2, 4, 8, 16) if width >= bits)
    assert codes.dtype == torch.uint8 and codes.shape[-1] <= 8 * 4 + 4 * channels * width / 8 + 4
