"""Twilight against its paper's formula in NumPy, what it keeps, what it reads, and what may stand beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_attention_hub import (
    AdaptiveSamplingMaskerConfig,
    LocalMaskerConfig,
    Mask,
    OracleTopKConfig,
    QuestTopKMaskerConfig,
    RandomSamplingMaskerConfig,
    ResearchAttention,
    ResearchAttentionConfig,
    RoundToPagesConfig,
    SinkMaskerConfig,
    TwilightConfig,
)
from sparse_attention_hub.maskers.base import MaskerConfig, create_masker
from sparse_attention_hub.maskers.inputs import AttentionInputs
from sparse_attention_hub.testing import MaskerContract

HEADS, KV_HEADS, KEYS, DIM = 4, 2, 150, 16


class TestTwilight(MaskerContract):
    """Without a selector: of all keys."""

    def make_config(self) -> MaskerConfig:
        return TwilightConfig(top_p=0.6)


class TestTwilightBehindASelector(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return TwilightConfig(top_p=0.8, label_bits=8)

    def full_config(self) -> MaskerConfig | None:
        return None  # it has what the selector chose at most

    def max_keys(self, n: int) -> int:
        return int(0.4 * n) + 2

    def attention(self, config: MaskerConfig | None = None) -> ResearchAttention:
        before = [SinkMaskerConfig(2), OracleTopKConfig(0.4)]
        return ResearchAttention(ResearchAttentionConfig([*before, config or self.make_config()]))


def tensors(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries = 2 * torch.randn(1, HEADS, rows, DIM, generator=generator)
    keys, values = (torch.randn(1, KV_HEADS, KEYS, DIM, generator=generator) for _ in range(2))
    return queries, keys, values


def chosen(configs: list[MaskerConfig], *args: Tensor) -> np.ndarray:
    """bool (H, rows, KEYS)."""
    result = ResearchAttention(ResearchAttentionConfig(configs))(*args)
    return (result.mask.inclusion_probability()[0] > 0).numpy()


def fewest(query: np.ndarray, keys: np.ndarray, candidates: list[int], kept: list[int], p: float, bits: int) -> set[int]:
    """The paper's pruner in float64: weights by softmax over the candidates, from keys with 2^bits levels per vector."""
    low, high = keys.min(1, keepdims=True), keys.max(1, keepdims=True)
    step = (high - low) / (2**bits - 1)
    rounded = np.round((keys - low) / step) * step + low if bits < 16 else keys
    logits = (rounded[candidates] @ query) / np.sqrt(len(query))
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    mass = {key: float(weight) for key, weight in zip(candidates, weights, strict=True)}
    stay = set(kept)
    reached = sum(mass[key] for key in stay)
    for key in sorted(set(candidates) - stay, key=lambda key: -mass[key]):
        if reached >= p:
            break
        stay.add(key)
        reached += mass[key]
    return stay


@pytest.mark.parametrize("bits", [2, 4, 16])
@pytest.mark.parametrize("p", [0.3, 0.85, 0.99])
@pytest.mark.parametrize("rows", [1, 6])
def test_the_fewest_candidates_that_reach_p(rows: int, p: float, bits: int) -> None:
    ends: list[MaskerConfig] = [SinkMaskerConfig(3), LocalMaskerConfig(5)]
    before = [*ends, QuestTopKMaskerConfig(64, 8)]
    args = tensors(rows)
    candidates, kept = chosen(before, *args), chosen(ends, *args)
    after = chosen([*before, TwilightConfig(p, bits)], *args)
    queries, keys = args[0][0].double().numpy(), args[1][0].double().numpy()
    dropped = 0
    for head in range(HEADS):
        for row in range(rows):
            own, fixed = candidates[head, row].nonzero()[0].tolist(), kept[head, row].nonzero()[0].tolist()
            expected = fewest(queries[head, row], keys[head // 2], own, fixed, p, bits)
            assert set(after[head, row].nonzero()[0].tolist()) == expected
            dropped += len(own) - len(expected)
    assert dropped > 0


def test_without_a_selector_its_candidates_are_all_keys() -> None:
    args = tensors(1)
    alone = chosen([TwilightConfig(0.7)], *args)
    queries, keys = args[0][0].double().numpy(), args[1][0].double().numpy()
    for head in range(HEADS):
        expected = fewest(queries[head, 0], keys[head // 2], list(range(KEYS)), [], 0.7, 4)
        assert set(alone[head, 0].nonzero()[0].tolist()) == expected
    with_sinks = chosen([SinkMaskerConfig(4), TwilightConfig(0.7)], *args)
    assert with_sinks[..., :4].all() and with_sinks[..., 4:].any()


def test_what_is_chosen_by_position_before_the_selector_stays_and_after_it_may_go() -> None:
    args = tensors(5)
    before: list[MaskerConfig] = [SinkMaskerConfig(4), LocalMaskerConfig(4)]
    position = chosen(before, *args)
    kept = chosen([*before, OracleTopKConfig(30), TwilightConfig(0.01)], *args)
    assert (kept >= position).all() and (kept.sum(-1) <= position.sum(-1) + 1).all()
    behind = chosen([OracleTopKConfig(30), *before, TwilightConfig(0.01)], *args)
    assert (behind.sum(-1) == 1).all()


def test_two_of_them_narrow_in_turn() -> None:
    args = tensors(3)
    once = chosen([OracleTopKConfig(60), TwilightConfig(0.9)], *args)
    twice = chosen([OracleTopKConfig(60), TwilightConfig(0.9), TwilightConfig(0.5)], *args)
    assert (twice <= once).all() and twice.sum() < once.sum() < 60 * HEADS * 3


def test_a_bias_is_part_of_the_weights() -> None:
    args = tensors(1)
    bias = torch.zeros(1, 1, 1, KEYS)
    bias[..., 17] = 30.0
    result = ResearchAttention(ResearchAttentionConfig([TwilightConfig(0.9)]))(*args, attention_mask=bias)
    assert result.mask.chosen()[0, :, 0].nonzero()[:, 1].tolist() == [17] * HEADS


def test_bytes_read_are_the_rounded_candidates_and_what_stays() -> None:
    args = tensors(1)
    before: list[MaskerConfig] = [SinkMaskerConfig(4), OracleTopKConfig(40)]
    candidates = ResearchAttention(ResearchAttentionConfig(before))(*args)
    result = ResearchAttention(ResearchAttentionConfig([*before, TwilightConfig(0.8)]))(*args)
    own = float(result.mask.group_counts().float().mean()) / KEYS
    given = float(candidates.mask.group_counts().float().mean()) / KEYS
    # The oracle reads all keys; of each candidate 4 of the 64 bits that a key and a value have per channel.
    assert result.kv_fraction == pytest.approx(own + 0.5 + given * 4 / 64)
    alone = ResearchAttention(ResearchAttentionConfig([TwilightConfig(0.8)]))(*args)
    assert alone.kv_fraction == pytest.approx(float(alone.mask.group_counts().float().mean()) / KEYS + 4 / 64)


def test_a_sampler_behind_it_is_unbiased() -> None:
    """What Twilight drops is residual again, so that the denominator is right on average."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, HEADS, 1, DIM), (1, KV_HEADS, 300, DIM), (1, KV_HEADS, 300, DIM)]
    queries, keys, values = (torch.randn(shape, generator=generator).expand(400, -1, -1, -1) for shape in shapes)
    dense = AttentionInputs(queries[:1], keys[:1], values[:1]).scores().logsumexp(-1)
    for sampler in (RandomSamplingMaskerConfig(0.2), AdaptiveSamplingMaskerConfig(0.1, 0.2, 0.2, 0, 0)):
        configs = [SinkMaskerConfig(4), OracleTopKConfig(60), TwilightConfig(0.8), sampler]
        result = ResearchAttention(ResearchAttentionConfig(configs))(queries, keys, values, seeds=list(range(400)))
        assert float((result.log_sum_exp - dense).exp().mean()) == pytest.approx(1.0, abs=0.02)
        assert float(result.mask.inclusion_probability().min()) > 0 or bool((result.mask.counts() > 30).all())


def test_order_of_the_pipeline() -> None:
    with pytest.raises(ValueError, match="a sampling masker must come last"):
        ResearchAttention(ResearchAttentionConfig([RandomSamplingMaskerConfig(0.1), TwilightConfig(0.9)]))
    args = tensors(2)
    pages = chosen([OracleTopKConfig(40), TwilightConfig(0.7), RoundToPagesConfig(8)], *args)
    assert (pages >= chosen([OracleTopKConfig(40), TwilightConfig(0.7)], *args)).all()


def test_the_mask_it_was_given_is_unchanged_and_shared_masks_stay_right() -> None:
    """Masks by position are shared by calls of one layout: narrowing must not reach them."""
    inputs = AttentionInputs(*tensors(4))
    attention = ResearchAttention(
        ResearchAttentionConfig([SinkMaskerConfig(4), LocalMaskerConfig(6), OracleTopKConfig(20), TwilightConfig(0.4)])
    )
    first = attention.make_mask(inputs).inclusion_probability()
    shared = [mask.inclusion_probability().clone() for mask in inputs.layout.chosen.values()]
    assert torch.equal(attention.make_mask(inputs).inclusion_probability(), first)
    for mask, before in zip(inputs.layout.chosen.values(), shared, strict=True):
        assert torch.equal(mask.inclusion_probability(), before)
    given = Mask.from_dense(torch.rand(inputs.shape) < 0.5, kv_heads=KV_HEADS)
    before = given.inclusion_probability().clone()
    create_masker(TwilightConfig(0.3)).select(inputs, given)
    assert torch.equal(given.inclusion_probability(), before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((0.0,), r"top_p must be a number in \(0.0, 1.0\], got 0.0"),
        ((1.5,), "top_p must be a number in"),
        ((0.9, 0), r"label_bits must be an integer in \[1, 16\], got 0"),
    ],
)
def test_bad_fields(fields: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwilightConfig(*fields)  # type: ignore[arg-type]
