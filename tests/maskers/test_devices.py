"""Every masker chooses the same keys by compiled loops as by the torch operations that other devices use."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from sparse_attention_hub import LocalMaskerConfig, ResearchAttention, ResearchAttentionConfig, SinkMaskerConfig, lists
from sparse_attention_hub.maskers.base import MaskerConfig
from sparse_attention_hub.maskers.drawing import example_configs

NAMES = [
    *("causal", "sink", "local", "oracle_top_k", "oracle_top_p", "quest", "double_sparsity", "hash_attention", "pq_cache"),
    *("random_sampling", "round_to_pages", "adaptive_sampling", "magic_pig"),
]


def configs_of(name: str) -> list[MaskerConfig]:
    folder = Path(tempfile.mkdtemp())  # channel files must outlive the configs
    ends = [SinkMaskerConfig(3), LocalMaskerConfig(0.05)]
    return [*ends, *example_configs(name, folder)[-1:]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_loops_and_torch_choose_alike(name: str, rows: int, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_attention_hub.maskers.drawing import example_inputs

    shape = example_inputs()
    heads, kv_heads, dim, keys = shape.shape[1], shape.kv_heads, shape.queries.shape[-1], 130
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(2, heads, rows, dim, generator=generator)
    tensors = [torch.randn(2, kv_heads, keys, dim, generator=generator) for _ in range(2)]
    mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows).expand(2, 1, -1, -1).clone()
    if padded:
        mask[0, :, :, :37] = False
    found = []
    for numba in (True, False):
        monkeypatch.setattr(lists, "HAS_NUMBA", numba)
        attention = ResearchAttention(ResearchAttentionConfig(configs_of(name)))
        state = attention.new_state()
        allowed = mask[:, 0, -1, : keys - rows]
        attention.prepare(tensors[0][:, :, : keys - rows], 0, state, allowed if padded else None)
        found.append(attention(queries, *tensors, attention_mask=mask, state=state, seeds=[3, 4]))
    one, other = found
    torch.testing.assert_close(one.mask.inclusion_probability(), other.mask.inclusion_probability(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.output, other.output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.log_sum_exp, other.log_sum_exp, rtol=1e-4, atol=1e-5)
    assert (one.density, one.kv_fraction) == pytest.approx((other.density, other.kv_fraction))
