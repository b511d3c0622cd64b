"""Clusters: the keys of the clusters whose centroids score highest.

ClusterKV (https://arxiv.org/abs/2412.03213), Squeezed Attention (https://arxiv.org/abs/2411.09688).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mask import Mask
from ..search_space import Choice
from .base import Masker, TopKConfig, check_int, draw_example, register_masker
from .codes import sum_codes
from .inputs import AttentionInputs
from .k_means import allowed_keys, assign, k_means


@dataclass
class ClustersConfig(TopKConfig):
    """heavy_size: see TopKConfig. cluster_size: keys per cluster on average (ClusterKV takes 80, Squeezed Attention 20).
    kmeans_iter: Lloyd iterations at most. seed: of the first centroids."""

    cluster_size: int = 16
    kmeans_iter: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cluster_size = check_int("cluster_size", self.cluster_size, 1)
        self.kmeans_iter = check_int("kmeans_iter", self.kmeans_iter, 1)
        self.seed = check_int("seed", self.seed, 0)

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return super().get_search_space(task_name) | {"cluster_size": Choice([8, 16, 32, 64])}


@dataclass(frozen=True)
class ClusterFit:
    """centroids: float32 (B, Hkv, C, D), zeros behind those of an item with fewer than the others. directions: the centroids of
    each item at length 1, (Hkv, 1, its C, D)."""

    centroids: Tensor
    directions: list[Tensor]


@register_masker(ClustersConfig)
class ClustersMasker(Masker[ClustersConfig]):
    """The keys of each kv head are clustered by k-means: a key belongs to the centroid with which it has the greatest cosine, a
    centroid is the mean of its keys. Per query head and row whole clusters are attended, by falling q . centroid, until
    `heavy_size` residual keys are found; of the last cluster the most recent ones.

    The centroids are built once on the context, each item of a batch by itself, and frozen: later keys join the nearest cluster.
    The state keeps the centroids and the number of each key's cluster, int32 (B, Hkv, N, 1).
    """

    keeps_to_allowed = True
    in_graphs = True
    code_fields = ("cluster_size", "kmeans_iter", "seed")

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        scores = self.shared(inputs, lambda: self._scores(inputs))
        return mask.union(inputs.choose_top(scores, mask, self.config.heavy_size))

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        return 0.5 / self.config.cluster_size  # a centroid is as large as a key

    def fit(self, keys: Tensor, allowed: Tensor | None, layer_idx: int) -> ClusterFit:
        """One cluster for every cluster_size of an item's allowed keys."""
        of_items = [None] * keys.shape[0] if allowed is None else allowed.unbind()
        found = [self._fit_item(allowed_keys(*item), layer_idx) for item in zip(keys.unbind(), of_items, strict=True)]
        most = max(centroids.shape[2] for centroids in found)
        padded = [F.pad(centroids[:, 0], (0, 0, 0, most - centroids.shape[2])) for centroids in found]
        return ClusterFit(torch.stack(padded), [_directions(centroids) for centroids in found])

    def join_fits(self, fits: list[ClusterFit]) -> ClusterFit:
        return ClusterFit(torch.cat([fit.centroids for fit in fits]), [own for fit in fits for own in fit.directions])

    def encode(self, keys: Tensor, fitted: ClusterFit, layer_idx: int) -> Tensor:
        codes = torch.empty((*keys.shape[:3], 1), dtype=torch.int32, device=keys.device)
        for own, directions, out in zip(keys, fitted.directions, codes, strict=True):
            assign(own, _as_points, directions, out)
        return codes

    def _fit_item(self, keys: Tensor, layer_idx: int) -> Tensor:
        """Centroids of one item's keys (Hkv, M, D): (Hkv, 1, C, D)."""
        heads, total, dim = keys.shape
        if total == 0:
            return torch.zeros((heads, 1, 1, dim), device=keys.device)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + layer_idx)
        clusters = max(1, total // self.config.cluster_size)
        return k_means(keys, _as_points, clusters, self.config.kmeans_iter, generator, _directions)

    def _scores(self, inputs: AttentionInputs) -> Tensor:
        """Each key's score is that of its centroid: (B, H, Q, N), with the attention mask's bias."""
        fitted, codes = self.codes(inputs)
        queries = (inputs.queries.float() * inputs.scaling).flatten(1, 2).unflatten(1, (inputs.kv_heads, -1))
        table = (queries @ fitted.centroids.transpose(-1, -2)).unsqueeze(3)  # (B, Hkv, R, 1, clusters)
        return inputs.layout.biased(sum_codes(table, codes).view(inputs.shape))


def _as_points(keys: Tensor) -> Tensor:
    return keys.float().unsqueeze(1)


def _directions(centroids: Tensor) -> Tensor:
    """Of all directions the nearest to a key is that of greatest cosine, whatever the key's length."""
    return F.normalize(centroids, dim=-1)


if __name__ == "__main__":
    draw_example("clusters")
