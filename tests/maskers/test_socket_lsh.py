"""SOCKET against its formula in NumPy, with every bucket of a table written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_attention_hub import ResearchAttention, ResearchAttentionConfig, SinkMaskerConfig, SocketConfig
from sparse_attention_hub.maskers import socket_lsh
from sparse_attention_hub.maskers.base import MaskerConfig
from sparse_attention_hub.maskers.socket_lsh import SocketMasker
from sparse_attention_hub.testing import MaskerContract

HEADS, KV_HEADS, KEYS, DIM = 4, 2, 120, 16


class TestSocket(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return SocketConfig(heavy_size=0.1, lsh_l=12, lsh_k=5)


class TestSocketWideTables(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return SocketConfig(heavy_size=0.1, lsh_l=5, lsh_k=9, tau=0.05)


def tensors(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, HEADS, rows, DIM), (1, KV_HEADS, KEYS, DIM), (1, KV_HEADS, KEYS, DIM)]
    queries, keys, values = (torch.randn(shape, generator=generator) for shape in shapes)
    return queries, keys, values * torch.rand(1, KV_HEADS, KEYS, 1, generator=generator)


def soft_collisions(query: np.ndarray, keys: np.ndarray, values: np.ndarray, planes: np.ndarray, tau: float) -> np.ndarray:
    """Scores of keys (N, D): planes (L, K, D)."""
    corners = np.array(list(itertools.product([-1.0, 1.0], repeat=planes.shape[1])))  # (2^K, K)
    scores = np.zeros(len(keys))
    for table in planes:
        logits = corners @ np.tanh(table @ query) / (np.sqrt(len(query)) * tau)
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        for i, key in enumerate(keys):
            signs = np.where(table @ key > 0, 1.0, -1.0)
            scores[i] += probabilities[(corners == signs).all(1)].item()
    return scores * np.linalg.norm(values, axis=1)


@pytest.mark.parametrize(("tables", "bits", "tau"), [(7, 3, 0.4), (4, 6, 0.1), (3, 9, 1.0)])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_keys_with_the_most_soft_collisions(rows: int, tables: int, bits: int, tau: float) -> None:
    queries, keys, values = tensors(rows)
    config = SocketConfig(15, lsh_l=tables, lsh_k=bits, tau=tau)
    pipeline = ResearchAttentionConfig([SinkMaskerConfig(2), config])
    mask = ResearchAttention(pipeline)(queries, keys, values, layer_idx=3).mask.inclusion_probability()[0]
    planes = SocketMasker(config).fit(keys, None, 3).double().T.reshape(tables, bits, DIM).numpy()
    for head in range(HEADS):
        for row in range(rows):
            seen = KEYS - rows + row + 1
            own = [tensor[0, head // 2, :seen].double().numpy() for tensor in (keys, values)]
            scores = soft_collisions(queries[0, head, row].double().numpy(), *own, planes, tau)
            scores[:2] = -1.0  # the sinks
            expected = set(np.argsort(-scores)[:15].tolist()) | {0, 1}
            assert set(mask[head, row].nonzero()[:, 0].tolist()) == expected


def test_many_rows_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    args = tensors(9)
    attention = ResearchAttention(ResearchAttentionConfig([SocketConfig(10, lsh_l=8, lsh_k=6)]))
    whole = attention(*args).mask.inclusion_probability()
    monkeypatch.setattr(socket_lsh, "BLOCK", 3000)
    assert torch.equal(attention(*args).mask.inclusion_probability(), whole)


def test_small_tau_counts_equal_buckets() -> None:
    """As tau goes to 0 a query has one bucket per table: the score is the number of tables that agree, times the norm."""
    queries, keys, values = tensors(1)
    values = values / values.norm(dim=-1, keepdim=True)
    config = SocketConfig(10, lsh_l=200, lsh_k=2, tau=1e-4)
    planes = SocketMasker(config).fit(keys, None, 0).view(DIM, 200, 2)
    agree = torch.einsum("hqd,dlk->hlk", queries[0], planes)[:, None] * torch.einsum(
        "hnd,dlk->hnlk", keys[0].repeat_interleave(2, 0), planes
    )
    counts = (agree > 0).all(-1).sum(-1)
    mask = ResearchAttention(ResearchAttentionConfig([config]))(queries, keys, values).mask.chosen()[0, :, 0]
    for head in range(HEADS):
        assert counts[head][mask[head]].min() >= counts[head][~mask[head]].max()


def test_bytes_read() -> None:
    for value_norm in (True, False):
        config = SocketConfig(12, lsh_l=10, lsh_k=4, value_norm=value_norm)
        result = ResearchAttention(ResearchAttentionConfig([config]))(*tensors(1))
        shared = float(result.mask.group_counts().float().mean()) / KEYS
        assert result.kv_fraction - shared == pytest.approx((10 * 4 / 8 + 4 * value_norm) / (2 * DIM * 4))


def test_without_norms_values_do_not_matter() -> None:
    queries, keys, values = tensors(2)
    attention = ResearchAttention(ResearchAttentionConfig([SocketConfig(12, lsh_l=10, lsh_k=4, value_norm=False)]))
    masks = [attention(queries, keys, own).mask.inclusion_probability() for own in (values, values.flip(2) ** 3)]
    assert torch.equal(*masks)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heavy_size": 0}, "heavy_size must be > 0, got 0"),
        ({"lsh_l": 0}, "lsh_l must be an integer >= 1, got 0"),
        ({"lsh_k": 13}, r"lsh_k must be an integer in \[1, 12\], got 13"),
        ({"tau": 0}, r"tau must be a number in \(0.0, 100.0\], got 0"),
        ({"value_norm": 1}, "value_norm must be True or False, got 1"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_bad_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SocketConfig(**({"heavy_size": 10} | fields))  # type: ignore[arg-type]
