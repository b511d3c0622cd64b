"""PQCache: the contract, and what its clustering and coding promise."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from sparse_attention_hub import PQCacheConfig, ResearchAttention, ResearchAttentionConfig
from sparse_attention_hub.maskers.base import MaskerConfig, create_masker
from sparse_attention_hub.maskers.pq_cache import PQCacheMasker, PQFit
from sparse_attention_hub.testing import MaskerContract


def config(**changes: object) -> PQCacheConfig:
    fields = {"heavy_size": 0.1, "pq_group_factor": 4, "pq_bits": 4, "kmeans_iter": 5, "init_offset": 4, "metric": "euclidean"}
    return PQCacheConfig(**(fields | changes))


class TestEuclidean(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return config()


class TestInnerProduct(MaskerContract):
    def make_config(self) -> MaskerConfig:
        return config(metric="ip", pq_group_factor=2, pq_bits=3, init_offset=0)


def nearest(keys: Tensor, fitted: PQFit) -> Tensor:
    """Codes by the definition: (B, Hkv, N, G)."""
    groups = fitted.centroids.shape[2]
    points = keys.double().unflatten(-1, (groups, -1)).transpose(2, 3)
    if fitted.square is not None:
        extra = (fitted.square.double().unsqueeze(-1) - points.square().sum(-1)).clamp(min=0).sqrt()
        points = torch.cat([points, extra.unsqueeze(-1)], -1)
    return torch.cdist(points, fitted.centroids.double()).argmin(-1).transpose(2, 3)


@pytest.mark.parametrize("metric", ["euclidean", "ip"])
def test_codes_belong_to_the_final_centres(metric: str) -> None:
    """Of the context's keys and of later ones alike, in both metrics."""
    masker = create_masker(config(metric=metric))
    keys = torch.randn(2, 2, 700, 32, generator=torch.Generator().manual_seed(0))
    later = 1.5 * torch.randn(2, 2, 50, 32, generator=torch.Generator().manual_seed(1))
    fitted = masker.fit(keys, None, 0)
    assert fitted.centroids.shape == (2, 2, 4, 16, 8 + (metric == "ip"))
    for part in (keys, later):
        agree = masker.encode(part, fitted, 0).long() == nearest(part, fitted)
        assert agree.float().mean() > 0.9999  # float32 may round a tie differently


@pytest.mark.parametrize("metric", ["euclidean", "ip"])
def test_more_iterations_fit_better(metric: str) -> None:
    keys = torch.randn(1, 2, 1500, 32, generator=torch.Generator().manual_seed(0))

    def distortion(iterations: int) -> float:
        masker = create_masker(config(metric=metric, kmeans_iter=iterations))
        fitted = masker.fit(keys, None, 0)
        codes = masker.encode(keys, fitted, 0).long().transpose(2, 3).unsqueeze(-1)
        centres = fitted.centroids[..., :8].gather(3, codes.expand(-1, -1, -1, -1, 8))
        return float((centres.transpose(2, 3).flatten(3) - keys).square().mean())

    assert distortion(10) < distortion(1) < float(keys.square().mean())


def test_scores_are_those_of_the_centres() -> None:
    """With as many centres as keys, the codes lose nothing and the choice is that of the true scores."""
    generator = torch.Generator().manual_seed(3)
    queries, keys, values = (torch.randn(shape, generator=generator) for shape in ((1, 8, 3, 32), *[(1, 2, 120, 32)] * 2))
    attention = ResearchAttention(ResearchAttentionConfig([config(heavy_size=12, pq_bits=8, init_offset=0)]))
    p = attention(queries, keys, values).mask.inclusion_probability()
    scores = queries @ keys.repeat_interleave(4, 1).transpose(-1, -2)
    scores = scores.masked_fill(torch.arange(120) > torch.arange(117, 120).unsqueeze(-1), float("-inf"))
    assert torch.equal(p.bool(), scores >= scores.topk(12).values[..., -1:])


def test_first_keys_are_neither_clustered_nor_chosen() -> None:
    generator = torch.Generator().manual_seed(3)
    queries, keys, values = (torch.randn(shape, generator=generator) for shape in ((1, 4, 1, 32), *[(1, 4, 90, 32)] * 2))
    moved = keys.clone()
    moved[:, :, :10] *= 50
    masker = create_masker(config(init_offset=10))
    assert torch.equal(masker.fit(keys, None, 0).centroids, masker.fit(moved, None, 0).centroids)
    attention = ResearchAttention(ResearchAttentionConfig([config(init_offset=10, heavy_size=0.5)]))
    assert bool((attention(queries, moved, values).mask.inclusion_probability()[..., :10] == 0).all())


def test_late_codes_do_not_move_the_centres() -> None:
    attention = ResearchAttention(ResearchAttentionConfig([config()]))
    state = attention.new_state()
    keys = torch.randn(1, 2, 300, 32, generator=torch.Generator().manual_seed(0))
    attention.prepare(keys[:, :, :200], 0, state)
    centroids = state.entry(0, 0).fitted.centroids
    attention(torch.randn(1, 4, 1, 32), keys, keys, state=state)
    assert state.entry(0, 0).fitted.centroids is centroids
    assert state.entry(0, 0).length == 300


def test_many_bits_survive_low_precision() -> None:
    """Codes above 256 are no floats of few bits."""
    keys = torch.randn(1, 1, 900, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    masker = create_masker(config(pq_bits=9, pq_group_factor=2, kmeans_iter=2))
    fitted = masker.fit(keys, None, 0)
    codes = masker.encode(keys, fitted, 0)
    assert codes.dtype == torch.int16 and int(codes.max()) > 256
    assert (codes.long() == nearest(keys.float(), fitted)).float().mean() > 0.999


def test_clustering_is_fast_and_small() -> None:
    """8 kv heads x 4,096 keys of 128 channels, 6 bits, 10 iterations: at most 3 s of one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        keys = torch.randn(1, 8, 4096, 128, generator=torch.Generator().manual_seed(0))
        masker = create_masker(config(pq_bits=6, pq_group_factor=2, kmeans_iter=10))
        start = time.process_time()
        masker.encode(keys, masker.fit(keys, None, 0), 0)
        assert time.process_time() - start <= 3.0
    finally:
        torch.set_num_threads(threads)


def test_a_block_of_distances_is_small() -> None:
    from sparse_attention_hub.maskers.k_means import BLOCKS
    from sparse_attention_hub.maskers.k_means import blocks as cut

    centroids = torch.zeros(8, 4, 256, 32)
    blocks = cut(131_072, centroids)
    assert blocks[0][0] == 0 and blocks[-1][1] == 131_072
    assert all(a[1] == b[0] for a, b in zip(blocks, blocks[1:], strict=False))
    # Distances and, on a GPU, membership in float32: 8 bytes a pair.
    assert max(stop - start for start, stop in blocks) * 8 * 4 * 256 * 8 <= 64 * 2**20
    assert max(BLOCKS.values()) * 8 <= 64 * 2**20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heavy_size": 0}, "heavy_size must be > 0, got 0"),
        ({"pq_group_factor": 0}, "pq_group_factor must be an integer >= 1, got 0"),
        ({"pq_bits": 17}, "pq_bits must be an integer in [1, 16], got 17"),
        ({"kmeans_iter": 0}, "kmeans_iter must be an integer >= 1, got 0"),
        ({"init_offset": -1}, "init_offset must be an integer >= 0, got -1"),
        ({"metric": "cosine"}, "metric must be one of euclidean, ip, got 'cosine'"),
    ],
)
def test_bad_values(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        config(**changes)
    assert message in str(caught.value)


def test_sub_vectors_must_divide_the_head_dimension() -> None:
    masker = PQCacheMasker(config(pq_group_factor=3))
    with pytest.raises(ValueError, match="pq_group_factor must divide the head dimension 32, got 3"):
        masker.fit(torch.randn(1, 1, 10, 32), None, 0)
