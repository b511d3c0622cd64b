"""Landmarks: pages by the mean of their keys, against NumPy, and what the state keeps of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_attention_hub import AttentionState, LandmarksConfig, ResearchAttention, ResearchAttentionConfig
from sparse_attention_hub.testing import MaskerContract


class TestLandmarks(MaskerContract):
    def make_config(self) -> LandmarksConfig:
        return LandmarksConfig(heavy_size=0.2, page_size=8)

    def max_keys(self, n: int) -> int:
        return max(1, int(0.2 * n) // 8) * 8


def expected_pages(queries: np.ndarray, keys: np.ndarray, page: int, count: int) -> set[int]:
    """By the definition, for the queries (G, D) of one kv head and its keys (N, D): each query's softmax over the scores of the
    pages' mean keys, summed over the queries."""
    means = np.stack([keys[start : start + page].mean(0) for start in range(0, len(keys), page)])
    shares = np.zeros(len(means))
    for query in queries:
        scores = means @ query / np.sqrt(len(query))
        weights = np.exp(scores - scores.max())
        shares += weights / weights.sum()
    return set(np.argsort(-shares)[:count].tolist())


def tensors(n: int, rows: int = 1, batch: int = 1) -> list[Tensor]:
    """4 query heads on 2 kv heads of 16 channels."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 4, rows, 16), (batch, 2, n, 16), (batch, 2, n, 16)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def attention(heavy_size: int | float, page_size: int) -> ResearchAttention:
    return ResearchAttention(ResearchAttentionConfig([LandmarksConfig(heavy_size, page_size)]))


def check(chosen: Tensor, queries: Tensor, keys: Tensor, page: int, count: int) -> None:
    """Chosen (H, N) are the expected pages, whole, of one row's queries (H, D) and keys (Hkv, N, D)."""
    group = queries.shape[0] // keys.shape[0]
    for head in range(queries.shape[0]):
        first = head // group * group
        own = queries[first : first + group].double().numpy(), keys[head // group].double().numpy()
        pages = expected_pages(*own, page, count)
        assert set((chosen[head].nonzero()[:, 0] // page).tolist()) == pages
        assert int(chosen[head].sum()) == sum(min(page, keys.shape[1] - p * page) for p in pages)


@pytest.mark.parametrize("page", [1, 7, 16])
def test_selection_is_the_definition(page: int) -> None:
    q, k, v = tensors(101)
    chosen = attention(32, page)(q, k, v).mask.inclusion_probability()[0, :, 0]
    check(chosen, q[0, :, 0], k[0], page, 32 // page)


def test_one_set_for_the_query_heads_of_a_kv_head() -> None:
    mask = attention(32, 8)(*tensors(101)).mask
    assert mask.shared_heads == 2
    p = mask.inclusion_probability()
    assert torch.equal(p[:, 0], p[:, 1]) and not torch.equal(p[:, 1], p[:, 2])


def test_a_batch_with_padding_is_its_items_alone() -> None:
    q, k, v = tensors(90, batch=3)
    padding = [0, 13, 40]
    allowed = torch.arange(90) >= torch.tensor(padding).unsqueeze(-1)
    k.masked_fill_(~allowed[:, None, :, None], 1e6)
    chosen = attention(24, 8)(q, k, v, attention_mask=allowed[:, None, None]).mask.inclusion_probability()[:, :, 0]
    for item, start in enumerate(padding):
        assert bool((chosen[item, :, :start] == 0).all())
        check(chosen[item, :, start:], q[item, :, 0], k[item, :, start:], 8, 3)


def test_decoding_with_a_state_is_a_call_without_one() -> None:
    q, k, v = tensors(140)
    landmarks = attention(32, 16)
    state = landmarks.new_state()
    landmarks.prepare(k[:, :, :100], 0, state)
    for n in range(101, 141):
        got = landmarks(q, k[:, :, :n], v[:, :, :n], state=state).mask.inclusion_probability()
        assert torch.equal(got, landmarks(q, k[:, :, :n], v[:, :, :n]).mask.inclusion_probability()), n
    assert state.entry(0, 0).codes().shape == (1, 2, 8, 16)


@pytest.mark.parametrize("back", [96, 97, 111, 112, 127])
def test_rewinding_and_forking_into_a_page(back: int) -> None:
    q, k, v = tensors(128)
    landmarks = attention(32, 16)
    state, forked = landmarks.new_state(), AttentionState()
    landmarks.prepare(k[:, :, :90], 0, state)
    landmarks(q, k, v, state=state)
    forked.adopt(0, 0, state.entry(0, 0).fork(back))
    other = torch.cat([k[:, :, :back], 3 * torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(5))], 2)
    values = torch.cat([v, v], 2)[:, :, : other.shape[2]]
    wanted = landmarks(q, other, values).mask.inclusion_probability()
    assert torch.equal(landmarks(q, other, values, state=forked).mask.inclusion_probability(), wanted)
    before = landmarks(q, k, v).mask.inclusion_probability()
    assert torch.equal(landmarks(q, k, v, state=state).mask.inclusion_probability(), before), "the fork changed its parent"
    state.rewind(back)
    assert torch.equal(landmarks(q, other, values, state=state).mask.inclusion_probability(), wanted)


def test_bytes_read_are_those_of_one_mean_per_page() -> None:
    result = attention(160, 16)(*tensors(1600))
    assert result.kv_fraction == pytest.approx(0.1 + 0.5 / 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heavy_size": 0}, "heavy_size must be > 0, got 0"),
        ({"page_size": 0}, "page_size must be an integer >= 1, got 0"),
        ({"page_size": 2.5}, "page_size must be an integer >= 1, got 2.5"),
    ],
)
def test_bad_configs(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LandmarksConfig(**({"heavy_size": 64, "page_size": 16} | fields))  # type: ignore[arg-type]
