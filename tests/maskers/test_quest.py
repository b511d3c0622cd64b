"""Quest: its pages, their bounds, and what the state keeps of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_attention_hub import QuestTopKMaskerConfig, ResearchAttention, ResearchAttentionConfig, SinkMaskerConfig
from sparse_attention_hub.maskers import quest as quest_module
from sparse_attention_hub.maskers.codes import pseudo_quantise
from sparse_attention_hub.testing import MaskerContract


class TestQuest(MaskerContract):
    def make_config(self) -> QuestTopKMaskerConfig:
        return QuestTopKMaskerConfig(heavy_size=0.2, page_size=8)

    def max_keys(self, n: int) -> int:
        return max(3, int(0.2 * n) // 8) * 8


class TestQuestFewBits(TestQuest):
    def make_config(self) -> QuestTopKMaskerConfig:
        return QuestTopKMaskerConfig(heavy_size=0.2, page_size=8, label_bits=4)


def attention(*configs: object) -> ResearchAttention:
    return ResearchAttention(ResearchAttentionConfig(list(configs)))


def tensors(
    n: int, rows: int = 1, batch: int = 1, heads: int = 4, kv_heads: int = 2, dim: int = 16, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, rows, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, dim)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def expected_pages(query: Tensor, keys: Tensor, page: int, count: int, bits: int) -> set[int]:
    """By the definition, for one query (D,) and keys (N, D)."""
    bounds = []
    for start in range(0, keys.shape[0], page):
        low, high = (
            pseudo_quantise(bound, bits) for bound in (keys[start : start + page].amin(0), keys[start : start + page].amax(0))
        )
        bounds.append(torch.maximum(query * low, query * high).sum())
    return set(torch.stack(bounds).topk(count).indices.tolist())


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("page", [1, 7, 16])
def test_selection_is_the_definition(page: int, bits: int) -> None:
    q, k, v = tensors(101)
    mask = attention(QuestTopKMaskerConfig(40, page, bits))(q, k, v).mask.inclusion_probability()[0, :, 0]
    for head in range(4):
        pages = expected_pages(q[0, head, 0], k[0, head // 2], page, max(3, 40 // page), bits)
        assert set((mask[head].nonzero()[:, 0] // page).tolist()) == pages
        assert int(mask[head].sum()) == sum(min(page, 101 - p * page) for p in pages)


def test_three_pages_at_least_and_sinks_spend_the_budget() -> None:
    q, k, v = tensors(160)
    assert int(attention(QuestTopKMaskerConfig(1, 16))(q, k, v).mask.counts().min()) == 48
    k[:, :, :16] += 5 * q[:, ::2]  # the sink's page is what every query wants
    alone = attention(QuestTopKMaskerConfig(48, 16))(q, k, v).mask.inclusion_probability()
    behind = attention(SinkMaskerConfig(16), QuestTopKMaskerConfig(48, 16))(q, k, v).mask.inclusion_probability()
    wanted = alone[..., 0] == 1
    assert bool(wanted.any())
    assert torch.equal(alone[wanted], behind[wanted])


def test_only_the_unfinished_page_is_bounded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded: list[tuple[int, int]] = []
    original = quest_module.page_bounds

    def counted(*arguments: Any) -> Tensor:
        bounded.append((arguments[4], arguments[5]))
        return original(*arguments)

    monkeypatch.setattr(quest_module, "page_bounds", counted)
    q, k, v = tensors(140)
    quest = attention(QuestTopKMaskerConfig(32, 16))
    state = quest.new_state()
    quest.prepare(k[:, :, :100], 0, state)
    assert bounded == [(0, 6)]
    for n in range(101, 141):
        bounded.clear()
        quest(q, k[:, :, :n], v[:, :, :n], state=state)
        assert all(first >= 6 and last - first == 1 for first, last in bounded) and len(bounded) <= 1 + (n % 16 == 0)


@pytest.mark.parametrize("back", [96, 97, 111, 112, 113, 127])
def test_rewinding_into_a_page(back: int) -> None:
    q, k, v = tensors(128)
    quest = attention(QuestTopKMaskerConfig(32, 16))
    state = quest.new_state()
    quest.prepare(k[:, :, :90], 0, state)
    quest(q, k, v, state=state)
    with pytest.raises(ValueError, match="rewind"):
        quest(q, k[:, :, :100], v[:, :, :100], state=state)
    state.rewind(back)
    other = torch.cat([k[:, :, :back], 3 * torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(5))], 2)
    values = torch.cat([v, v], 2)[:, :, : other.shape[2]]
    got = quest(q, other, values, state=state).mask.inclusion_probability()
    assert torch.equal(got, quest(q, other, values).mask.inclusion_probability())


def test_future_and_padded_keys_are_never_chosen_and_padding_never_bounds() -> None:
    q, k, v = tensors(64, rows=20, batch=2)
    k[1, :, :13] = 1e6
    allowed = torch.ones(2, 1, 20, 64, dtype=torch.bool).tril(44)
    allowed[1, ..., :13] = False
    result = attention(QuestTopKMaskerConfig(24, 8))(q, k, v, attention_mask=allowed)
    p = result.mask.inclusion_probability()
    assert bool((p[~allowed.expand(p.shape)] == 0).all())
    alone = attention(QuestTopKMaskerConfig(24, 8))(q[1:], k[1:, :, 13:], v[1:, :, 13:]).mask.inclusion_probability()
    assert torch.equal(p[1, ..., 13:], alone[0])


def test_pages_count_less_than_keys_in_bytes_read() -> None:
    q, k, v = tensors(1600)
    result = attention(QuestTopKMaskerConfig(160, 16, 16))(q, k, v)
    shared = float(result.mask.group_counts().float().mean()) / 1600
    assert result.kv_fraction == pytest.approx(shared + 1 / 16)
    few = attention(QuestTopKMaskerConfig(160, 16, 4))(q, k, v)
    assert few.kv_fraction - float(few.mask.group_counts().float().mean()) / 1600 == pytest.approx(4 / 32 / 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heavy_size": 0}, "heavy_size must be > 0, got 0"),
        ({"heavy_size": 1.5}, r"heavy_size .* got 1.5"),
        ({"page_size": 0}, "page_size must be an integer >= 1, got 0"),
        ({"page_size": 2.5}, "page_size must be an integer >= 1, got 2.5"),
        ({"label_bits": 17}, r"label_bits must be an integer in \[1, 16\], got 17"),
        ({"label_bits": 0}, r"label_bits must be an integer in \[1, 16\], got 0"),
    ],
)
def test_bad_configs(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuestTopKMaskerConfig(**({"heavy_size": 64, "page_size": 16} | fields))  # type: ignore[arg-type]
