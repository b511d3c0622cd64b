"""Every masker chooses the same keys by compiled loops as by the torch operations that other devices use."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from sparse_attention_hub import LocalMaskerConfig, ResearchAttention, ResearchAttentionConfig, SinkMaskerConfig, lists
from sparse_attention_hub.maskers.base import MaskerConfig
from sparse_attention_hub.maskers.drawing import example_configs, example_inputs
from sparse_attention_hub.maskers.inputs import AttentionInputs
from sparse_attention_hub.testing import prepared

NAMES = [
    *("snap_kv", "expected_attention", "key_diff", "knorm", "h2o", "tova"),
    *("causal", "sink", "local", "oracle_top_k", "oracle_top_p", "quest", "double_sparsity", "hash_attention", "pq_cache"),
    *("random_sampling", "round_to_pages", "adaptive_sampling", "magic_pig"),
    *("landmarks", "sparq", "loki", "clusters"),
    *("twilight", "duo_attention", "socket_lsh"),
]


def configs_of(name: str) -> list[MaskerConfig]:
    folder = Path(tempfile.mkdtemp())  # channel files must outlive the configs
    ends = [SinkMaskerConfig(3), LocalMaskerConfig(0.05)]
    return [*ends, *example_configs(name, folder)[-1:]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_loops_and_torch_choose_alike(name: str, rows: int, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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
        allowed = mask[:, 0, -1, : keys - rows] if padded else None
        state = prepared(attention, tensors[0][:, :, : keys - rows], heads, allowed)
        found.append(attention(queries, *tensors, attention_mask=mask, state=state, seeds=[3, 4]))
    one, other = found
    torch.testing.assert_close(one.mask.inclusion_probability(), other.mask.inclusion_probability(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.output, other.output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.log_sum_exp, other.log_sum_exp, rtol=1e-4, atol=1e-5)
    assert (one.density, one.kv_fraction) == pytest.approx((other.density, other.kv_fraction))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("loops", [True, False])
def test_blocks_of_queries_choose_as_the_whole_call(name: str, loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "HAS_NUMBA", loops)
    example = example_inputs()
    heads, kv_heads, dim, keys, rows = example.shape[1], example.kv_heads, example.queries.shape[-1], 130, 23
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(2, heads, rows, dim, generator=generator)
    tensors = [torch.randn(2, kv_heads, keys, dim, generator=generator) for _ in range(2)]
    attention = ResearchAttention(ResearchAttentionConfig(configs_of(name)))

    def attend(at_once: int) -> tuple[torch.Tensor, torch.Tensor]:
        state, found = prepared(attention, tensors[0][:, :, : keys - rows], heads), []
        for start in range(0, rows, at_once):
            own = queries[:, :, start : start + at_once]
            after = rows - start - own.shape[2]
            found.append(attention.attend_inputs(AttentionInputs(own, *tensors, seeds=[3, 4], rows_after=after), state))
        return torch.cat([part.mask.inclusion_probability() for part in found], 2), torch.cat(
            [part.output for part in found], 1
        )

    whole = attend(rows)
    for at_once in (8, 1):
        for one, other in zip(attend(at_once), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
