"""Clusters: k-means of the keys, whole clusters by their centroids' scores, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_attention_hub import AttentionState, ClustersConfig, ResearchAttention, ResearchAttentionConfig, SinkMaskerConfig
from sparse_attention_hub.testing import MaskerContract

SIZE, ITERATIONS = 10, 4


class TestClusters(MaskerContract):
    def make_config(self) -> ClustersConfig:
        return ClustersConfig(heavy_size=0.1, cluster_size=8, kmeans_iter=3)


def cosine_k_means(keys: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """(centroids (C, D), cluster of each key) of keys (N, D): a key belongs to the centroid with which it has the greatest cosine,
    a centroid is the mean of its keys. The first ones are random keys; one without keys moves to a random key."""
    generator = torch.Generator().manual_seed(layer)
    count = max(1, len(keys) // SIZE)
    centroids = keys[torch.randperm(len(keys), generator=generator)[:count].numpy()]

    def nearest() -> np.ndarray:
        return (keys @ (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).T).argmax(1)

    for _ in range(ITERATIONS):
        own, spare = nearest(), torch.randint(len(keys), (count,), generator=generator).tolist()
        members = [keys[own == cluster] for cluster in range(count)]
        centroids = np.stack([part.mean(0) if len(part) else keys[key] for part, key in zip(members, spare, strict=True)])
    return centroids, nearest()


def expected_keys(query: np.ndarray, centroids: np.ndarray, own: np.ndarray, closed: int, size: int) -> set[int]:
    """Whole clusters by falling q . centroid until `size` keys from `closed` on are found; of the last cluster the most recent."""
    chosen: list[int] = []
    for cluster in np.argsort(-(centroids @ query)):
        members = [key for key in np.flatnonzero(own == cluster).tolist() if key >= closed]
        chosen += members[::-1][: size - len(chosen)]
    return set(chosen)


def tensors(n: int, rows: int = 1, batch: int = 1) -> list[Tensor]:
    """4 query heads on 2 kv heads of 16 channels; the keys lie in 6 directions, at different lengths."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, 6, 16, generator=generator)
    places = torch.randint(6, (batch, 2, n), generator=generator)
    keys = torch.stack([directions[head][places[:, head]] for head in range(2)], 1)
    keys = keys * (0.5 + 2 * torch.rand(batch, 2, n, 1, generator=generator))
    keys += 0.3 * torch.randn(batch, 2, n, 16, generator=generator)
    queries, values = torch.randn(batch, 4, rows, 16, generator=generator), torch.randn(batch, 2, n, 16, generator=generator)
    return [queries, keys, values]


def attention(heavy_size: int | float, *before: object, **fields: int) -> ResearchAttention:
    config = ClustersConfig(heavy_size, **({"cluster_size": SIZE, "kmeans_iter": ITERATIONS} | fields))
    return ResearchAttention(ResearchAttentionConfig([*before, config]))  # type: ignore[list-item]


def check(chosen: Tensor, queries: Tensor, keys: Tensor, size: int, layer: int = 0, fitted: int = 0, closed: int = 0) -> None:
    """Chosen (H, N) for queries (H, D), keys (Hkv, N, D); the clusters were built on the first `fitted` keys, default all."""
    for head in range(queries.shape[0]):
        own_keys = keys[head // 2].double().numpy()
        centroids, own = cosine_k_means(own_keys[: fitted or None], layer)
        unit = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
        own = np.concatenate([own, (own_keys[len(own) :] @ unit.T).argmax(1)])
        wanted = expected_keys(queries[head].double().numpy(), centroids, own, closed, size)
        found = set(chosen[head].nonzero()[:, 0].tolist())
        assert {key for key in found if key >= closed} == wanted


@pytest.mark.parametrize("size", [1, 7, 40, 101])
@pytest.mark.parametrize("layer", [0, 3])
def test_selection_is_the_definition(size: int, layer: int) -> None:
    q, k, v = tensors(101)
    chosen = attention(size)(q, k, v, layer_idx=layer).mask.inclusion_probability()[0, :, 0]
    check(chosen, q[0, :, 0], k[0], size, layer)


def test_clusters_of_one_key_are_the_true_top_k() -> None:
    q, k, v = tensors(101)
    chosen = attention(12, cluster_size=1)(q, k, v).mask.inclusion_probability()[0, :, 0]
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2))[0, :, 0]
    assert torch.equal(chosen.bool(), scores >= scores.topk(12).values[..., -1:])


def test_keys_are_chosen_beside_those_of_earlier_maskers() -> None:
    q, k, v = tensors(101)
    chosen = attention(20, SinkMaskerConfig(10))(q, k, v).mask.inclusion_probability()[0, :, 0]
    assert bool((chosen[:, :10] == 1).all()) and bool((chosen.sum(-1) == 30).all())
    check(chosen, q[0, :, 0], k[0], 20, closed=10)


def test_a_batch_with_padding_is_its_items_alone() -> None:
    q, k, v = tensors(90, batch=3)
    padding = [0, 13, 40]
    allowed = torch.arange(90) >= torch.tensor(padding).unsqueeze(-1)
    k.masked_fill_(~allowed[:, None, :, None], float("nan"))
    chosen = attention(11)(q, k, v, attention_mask=allowed[:, None, None]).mask.inclusion_probability()[:, :, 0]
    for item, start in enumerate(padding):
        assert bool((chosen[item, :, :start] == 0).all())
        check(chosen[item, :, start:], q[item, :, 0], k[item, :, start:], 11)


def test_later_keys_join_the_nearest_cluster_and_move_none() -> None:
    q, k, v = tensors(130)
    clusters = attention(30)
    state, forked = clusters.new_state(), AttentionState()
    clusters.prepare(k[:, :, :100], 0, state)
    fitted = state.entry(0, 0).fitted

    def check_steps(state: AttentionState, keys: Tensor) -> None:
        for n in (101, 102, 130):
            chosen = clusters(q, keys[:, :, :n], v[:, :, :n], state=state).mask.inclusion_probability()[0, :, 0]
            check(chosen, q[0, :, 0], keys[0, :, :n], 30, fitted=100)

    check_steps(state, k)
    forked.adopt(0, 0, state.entry(0, 0).fork(100))
    check_steps(forked, torch.cat([k[:, :, :100], k[:, :, :30]], 2))
    state.rewind(100)
    check_steps(state, torch.cat([k[:, :, :100], -k[:, :, :30]], 2))
    assert state.entry(0, 0).fitted is fitted is forked.entry(0, 0).fitted
    state.rewind(99)
    assert not state.entry(0, 0).is_fitted


def test_the_number_of_clusters_follows_each_items_keys() -> None:
    _, k, _ = tensors(90, batch=2)
    allowed = torch.arange(90) >= torch.tensor([0, 40]).unsqueeze(-1)
    masker = attention(11).maskers[0]
    assert [directions.shape for directions in masker.fit(k, allowed, 0).directions] == [(2, 1, 9, 16), (2, 1, 5, 16)]
    empty = masker.fit(k, allowed & False, 0)
    assert empty.centroids.shape == (2, 2, 1, 16), "items of padding alone"


def test_bytes_read_are_those_of_the_centroids() -> None:
    result = attention(20, cluster_size=25)(*tensors(100))
    shared = float(result.mask.group_counts().float().mean()) / 100
    assert result.kv_fraction - shared == pytest.approx(0.5 / 25)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heavy_size": -1}, "heavy_size must be > 0, got -1"),
        ({"cluster_size": 0}, "cluster_size must be an integer >= 1, got 0"),
        ({"kmeans_iter": 0}, "kmeans_iter must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_bad_configs(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClustersConfig(**({"heavy_size": 64, "cluster_size": 16} | fields))
