"""MagicPig: the contract, and that hashes and probabilities are of one kind."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from sparse_attention_hub import MagicPigConfig, Mask, ResearchAttention, ResearchAttentionConfig, SinkMaskerConfig
from sparse_attention_hub.maskers.base import MaskerConfig
from sparse_attention_hub.maskers.inputs import AttentionInputs
from sparse_attention_hub.maskers.magic_pig import MagicPigMasker
from sparse_attention_hub.testing import MaskerContract


class TestOneMatch(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return MagicPigConfig(lsh_l=20, lsh_k=4)

    def config_for_seed(self, seed: int) -> MaskerConfig:
        return MagicPigConfig(lsh_l=20, lsh_k=4, seed=seed)


class TestTwoMatches(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return MagicPigConfig(lsh_l=40, lsh_k=4, min_matches=2, center=False)

    def config_for_seed(self, seed: int) -> MaskerConfig:
        return MagicPigConfig(lsh_l=40, lsh_k=4, min_matches=2, center=False, seed=seed)


def tensors(n: int = 120, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, 4, rows, 16, generator=generator),
        torch.randn(1, 2, n, 16, generator=generator) + 0.5,
        torch.randn(1, 2, n, 16, generator=generator),
    )


def run(config: MagicPigConfig, *args: Tensor, state: object = None) -> Tensor:
    return ResearchAttention(ResearchAttentionConfig([config]))(*args, state=state).mask.inclusion_probability()


@pytest.mark.parametrize(
    ("lsh_l", "lsh_k", "matches", "center"), [(6, 3, 1, True), (6, 3, 2, False), (2, 2, 2, True), (3, 9, 1, True)]
)
def test_probability_is_how_often_a_key_is_chosen(lsh_l: int, lsh_k: int, matches: int, center: bool) -> None:
    inputs, times = AttentionInputs(*tensors(40)), 500
    chosen, stated = torch.zeros(inputs.shape), torch.zeros(inputs.shape)
    masker = MagicPigMasker(MagicPigConfig(lsh_l, lsh_k, center=center, min_matches=matches))
    for seed in range(times):
        masker.config = dataclasses.replace(masker.config, seed=seed)
        p = masker.select(inputs, Mask.empty(inputs.shape, kv_heads=2)).inclusion_probability()
        chosen += p > 0
        stated = torch.maximum(stated, p)
    seen = stated > 0  # a key never chosen has no stated p, and a small one
    noise = (stated * (1 - stated) / times).sqrt()
    assert bool(((chosen / times - stated).abs() <= 5 * noise + 1e-3)[seen].all())
    assert float(seen.float().mean()) > 0.5


@pytest.mark.parametrize("lsh_k", [3, 8, 11, 16, 31, 33, 64])
def test_packing_keeps_every_bit(lsh_k: int) -> None:
    masker = MagicPigMasker(MagicPigConfig(5, lsh_k))
    keys = torch.randn(1, 1, 30, 16, generator=torch.Generator().manual_seed(0))
    fitted = masker.fit(keys, None, 0)
    words = masker.encode(keys, fitted, 0)
    assert words.shape == (1, 1, 30, 5) and words.element_size() * 8 < 2 * max(lsh_k, 8)
    centred = keys - fitted.mean
    extra = (fitted.norm**2 - centred.norm(dim=-1) ** 2).clamp(min=0).sqrt().unsqueeze(-1)
    bits = (torch.cat([centred, extra], -1) @ fitted.projections > 0).unflatten(-1, (5, lsh_k))
    unpacked = torch.stack([(words.long() >> place) & 1 for place in range(lsh_k)], -1).bool()
    assert float((unpacked == bits).float().mean()) > 0.999  # signs of near-zero projections may round apart


def test_long_signatures_match_the_own_key_alone() -> None:
    keys = tensors()[1]
    # Its own key is the only one that shares 64 bits with a query, where the norms agree.
    p = run(MagicPigConfig(2, 64, center=False), 3 * keys[:, :, 7:8], keys / keys.norm(dim=-1, keepdim=True), keys)
    assert bool((p[..., 7] > 0.99).all())
    assert int((p > 0).sum(-1).max()) == 1


def test_norms_are_an_items_and_a_heads_own_and_frozen() -> None:
    queries, keys, values = tensors()
    attention = ResearchAttention(ResearchAttentionConfig([MagicPigConfig(8, 4)]))
    state = attention.new_state()
    attention.prepare(keys, 0, state)
    before = attention(queries, keys, values, state=state).mask.inclusion_probability()
    longer = torch.cat([keys, 40 * keys[:, :, :1]], 2)
    after = attention(queries, longer, torch.cat([values, values[:, :, :1]], 2), state=state).mask.inclusion_probability()
    assert torch.equal(after[..., :-1], before), "a late key of large norm changed what was hashed before"
    assert bool(((after >= 0) & (after <= 1)).all())
    other = keys.clone()
    other[:, 1] *= 9
    p = run(MagicPigConfig(8, 4), queries, other, values)
    assert torch.equal(p[:, :2], run(MagicPigConfig(8, 4), queries, keys, values)[:, :2]), "a head's norm reached another"


def test_a_late_key_of_large_norm_keeps_the_estimate_unbiased() -> None:
    queries, keys, values = tensors(60)
    longer, more = torch.cat([keys, 3 * keys[:, :, :5]], 2), torch.cat([values, values[:, :, :5]], 2)
    dense = AttentionInputs(queries, longer, more).scores().logsumexp(-1)
    ratios = []
    for seed in range(400):
        attention = ResearchAttention(ResearchAttentionConfig([SinkMaskerConfig(1), MagicPigConfig(30, 4, seed=seed)]))
        state = attention.new_state()
        attention.prepare(keys, 0, state)
        ratios.append((attention(queries, longer, more, state=state).log_sum_exp - dense).exp())
    assert abs(float(torch.stack(ratios).mean()) - 1) <= 0.05


def test_no_row_is_left_without_a_key() -> None:
    queries, keys, values = tensors(50, rows=5)
    result = ResearchAttention(ResearchAttentionConfig([MagicPigConfig(1, 40)]))(queries, keys, values)
    assert result.empty_rows > 0
    assert bool((result.mask.inclusion_probability() > 0).any(-1).all())
    assert result.output.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lsh_l": 0}, "lsh_l must be an integer >= 1, got 0"),
        ({"lsh_k": -1}, "lsh_k must be an integer in [1, 64], got -1"),
        ({"lsh_k": 65}, "lsh_k must be an integer in [1, 64], got 65"),
        ({"center": "no"}, "center must be True or False, got 'no'"),
        ({"seed": None}, "seed must be an integer >= 0, got None"),
        ({"min_matches": 3}, "min_matches must be an integer in [1, 2], got 3"),
        ({"lsh_l": 1, "min_matches": 2}, "min_matches must be <= lsh_l = 1, got 2"),
    ],
)
def test_bad_values(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        MagicPigConfig(**({"lsh_l": 8, "lsh_k": 4} | fields))
    assert message in str(caught.value)
