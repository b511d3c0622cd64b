"""PQCache: top-k by scores from product-quantised keys (https://arxiv.org/abs/2407.12820)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..mask import Mask
from ..search_space import Choice
from .base import Masker, TopKConfig, check_int, draw_example, register_masker
from .codes import sum_codes
from .inputs import AttentionInputs

METRICS = ("euclidean", "ip")
# Floats in the largest temporary of clustering and coding: on a CPU, where it should stay in the cache, and on a GPU.
BLOCKS = {"cpu": 2**20, "gpu": 2**23}


@dataclass
class PQCacheConfig(TopKConfig):
    """heavy_size: see TopKConfig.

    pq_group_factor: sub-vectors that a key is cut into; must divide the head dimension. pq_bits: 2^bits centres each, 1 to 16.
    kmeans_iter: Lloyd iterations at most. init_offset: the first keys, which are neither clustered nor chosen (sinks).
    metric: "euclidean", or "ip" (inner product: keys get a coordinate that makes their norms equal). seed: for the centres.
    """

    pq_group_factor: int
    pq_bits: int
    kmeans_iter: int
    init_offset: int
    metric: str
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pq_group_factor = check_int("pq_group_factor", self.pq_group_factor, 1)
        self.pq_bits = check_int("pq_bits", self.pq_bits, 1, 16)
        self.kmeans_iter = check_int("kmeans_iter", self.kmeans_iter, 1)
        self.init_offset = check_int("init_offset", self.init_offset, 0)
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        self.seed = check_int("seed", self.seed, 0)

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        codes = {"pq_group_factor": Choice([2, 4, 8]), "pq_bits": Choice([4, 6, 8])}
        return super().get_search_space(task_name) | codes


@dataclass(frozen=True)
class PQFit:
    """centroids: float32 (B, Hkv, G, 2^bits, D/G), one channel more for "ip". square, for "ip" only: largest
    squared norm of the sub-vectors fitted on, float32 (B, Hkv, G)."""

    centroids: Tensor
    square: Tensor | None = None


@register_masker(PQCacheConfig)
class PQCacheMasker(Masker[PQCacheConfig]):
    """Each key is kept as one code a sub-vector, that of the nearest of 2^bits centres; a query scores the centres once, and
    a key by the sum of its centres' scores. Per query head and row the `heavy_size` residual keys of highest score.

    Centres are fitted on the context's keys, each item of a batch by itself, and frozen; later keys take the nearest one. Codes
    are (B, Hkv, N, G). Of keys with equal scores the most recent are chosen.
    """

    keeps_to_allowed = True
    code_fields = ("pq_group_factor", "pq_bits", "kmeans_iter", "init_offset", "metric", "seed")

    @property
    def code_dtype(self) -> torch.dtype:
        bits = self.config.pq_bits
        return torch.uint8 if bits <= 8 else torch.int16 if bits <= 15 else torch.int32

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        scores = self.shared(inputs, lambda: self._scores(inputs))
        whole = inputs.resolve(self.config.heavy_size) >= inputs.layout.totals
        # Keys inside the offset are not chosen, unless the budget is all keys.
        offsets = inputs.resolve(self.config.init_offset).masked_fill(whole, 0)
        closed = mask.union(inputs.layout.first_keys(offsets)) if bool(offsets.any()) else mask
        return mask.union(inputs.choose_top(scores, closed, self.config.heavy_size))

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        code_bytes = self.config.pq_group_factor * self.config.pq_bits / 8
        return code_bytes / (2 * inputs.keys.shape[-1] * inputs.keys.element_size())

    def fit(self, keys: Tensor, allowed: Tensor | None, layer_idx: int) -> PQFit:
        """keys (B, Hkv, N, D), allowed bool (B, N) or None. ValueError if pq_group_factor does not divide D."""
        groups, dim = self.config.pq_group_factor, keys.shape[-1]
        if dim % groups:
            raise ValueError(f"pq_group_factor must divide the head dimension {dim}, got {groups}")
        fits = [self._fit_item(self._clustered(keys, allowed, item), layer_idx) for item in range(keys.shape[0])]
        square = torch.stack([square for _, square in fits]) if self.config.metric == "ip" else None
        return PQFit(torch.stack([centroids for centroids, _ in fits]), square)

    def encode(self, keys: Tensor, fitted: PQFit, layer_idx: int) -> Tensor:
        batch, heads, total, _ = keys.shape
        codes = torch.empty((batch, heads, total, self.config.pq_group_factor), dtype=self.code_dtype, device=keys.device)
        for item in range(batch):
            square = None if fitted.square is None else fitted.square[item]
            for start, stop in _blocks(total, fitted.centroids[item]):
                points = self._points(keys[item, :, start:stop], square)
                codes[item, :, start:stop] = _nearest(points, fitted.centroids[item]).transpose(1, 2).to(self.code_dtype)
        return codes

    def _scores(self, inputs: AttentionInputs) -> Tensor:
        """Approximate scores (B, H, Q, N): scaled, with the attention mask's bias."""
        fitted, codes = self.codes(inputs)
        batch, heads, rows, total = inputs.shape
        groups, centres = fitted.centroids.shape[2:4]
        width = inputs.keys.shape[-1] // groups
        # Scores of all centres for the rows of a kv head's queries: (B, Hkv, R, G, 2^bits).
        parts = (inputs.queries.float() * inputs.scaling).reshape(batch, inputs.kv_heads, -1, groups, width)
        table = (parts.transpose(2, 3) @ fitted.centroids[..., :width].transpose(-1, -2)).transpose(2, 3)
        return inputs.layout.biased(sum_codes(table, codes).reshape(batch, heads, rows, total))

    def _clustered(self, keys: Tensor, allowed: Tensor | None, item: int) -> Tensor:
        """The item's keys to cluster, (Hkv, M, D): allowed ones past the offset, or all allowed ones if those are none."""
        own = keys[item]
        if allowed is not None:
            places = allowed[item].nonzero().squeeze(-1)
            together = places.numel() and int(places[-1] - places[0]) + 1 == places.numel()
            # Padding on one side leaves a slice, which costs no copy.
            own = own[:, int(places[0]) : int(places[-1]) + 1] if together else own[:, places]
        return own[:, self.config.init_offset :] if own.shape[1] > self.config.init_offset else own

    def _points(self, keys: Tensor, square: Tensor | None) -> Tensor:
        """Sub-vectors in float32: keys (Hkv, n, D) to (Hkv, G, n, D/G), for "ip" with sqrt(square - |x|^2) added."""
        points = keys.reshape(*keys.shape[:2], self.config.pq_group_factor, -1).transpose(1, 2).float()
        if square is None:
            return points
        extra: Tensor = (square.unsqueeze(-1) - points.square().sum(-1)).clamp(min=0).sqrt()
        return torch.cat([points, extra.unsqueeze(-1)], -1)

    def _fit_item(self, keys: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Lloyd's algorithm for all heads and sub-vectors of one item: centres (Hkv, G, 2^bits, w), largest square (Hkv, G)."""
        config, groups = self.config, self.config.pq_group_factor
        heads, total, dim = keys.shape
        centres = 2**config.pq_bits
        square = torch.zeros((heads, groups), device=keys.device)
        if total == 0:
            return square.new_zeros((heads, groups, centres, dim // groups + (config.metric == "ip"))), square
        for start, stop in _blocks(total, square.new_empty((heads, groups, 1, dim // groups))):
            square = torch.maximum(square, self._points(keys[:, start:stop], None).square().sum(-1).amax(-1))
        shift = square if config.metric == "ip" else None
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + layer_idx)
        first = torch.randperm(total, generator=generator)[:centres].repeat(-(-centres // total))[:centres]
        centroids = self._points(keys[:, first.to(keys.device)], shift)
        for _ in range(config.kmeans_iter):
            sums, counts = centroids.new_zeros(centroids.shape), centroids.new_zeros(centroids.shape[:3])
            for start, stop in _blocks(total, centroids):
                points = self._points(keys[:, start:stop], shift)
                _add_members(points, _nearest(points, centroids), sums, counts)
            spare = torch.randint(total, (centres,), generator=generator).to(keys.device)
            # A centre without keys moves to a random key.
            counts = counts.unsqueeze(-1)
            moved = torch.where(counts > 0, sums / counts.clamp(min=1), self._points(keys[:, spare], shift))
            drift = (moved - centroids).norm(dim=-1).sum(-1)
            centroids = moved
            if float(drift.max()) < 1e-2:
                break
        return centroids, square


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centre: points (Hkv, G, n, w), centroids (Hkv, G, C, w) to int64 (Hkv, G, n)."""
    # |x - c|^2 less |x|^2, which is the same for all centres.
    offset = centroids.square().sum(-1).flatten(0, 1).unsqueeze(1)
    distance = torch.baddbmm(offset, points.flatten(0, 1), centroids.flatten(0, 1).transpose(-1, -2), alpha=-2)
    if distance.is_cuda:
        return distance.argmin(-1).view(points.shape[:3])
    return torch.from_numpy(distance.detach().numpy().argmin(-1)).view(points.shape[:3])  # five times as fast as torch's


def _add_members(points: Tensor, codes: Tensor, sums: Tensor, counts: Tensor) -> None:
    """Add points (Hkv, G, n, w) to the sums (Hkv, G, C, w) and counts (Hkv, G, C) of the centres that codes (Hkv, G, n) name."""
    centres, width = sums.shape[2:]
    if points.is_cuda:  # where adding by index goes in any order, and sums would differ from run to run
        member = torch.zeros((*codes.shape, centres), device=points.device).scatter_(-1, codes.unsqueeze(-1), 1.0)
        sums += member.transpose(-1, -2) @ points
        counts += member.sum(2)
    else:
        rows = (codes + centres * torch.arange(codes.shape[0] * codes.shape[1]).view(*codes.shape[:2], 1)).flatten()
        sums.view(-1, width).index_add_(0, rows, points.reshape(-1, width))
        counts += torch.bincount(rows, minlength=counts.numel()).view(counts.shape)


def _blocks(total: int, centroids: Tensor) -> list[tuple[int, int]]:
    """Ranges of keys whose distances to all centres (Hkv, G, C, w) fit into one temporary."""
    heads, groups, centres, width = centroids.shape
    step = max(1, BLOCKS["gpu" if centroids.is_cuda else "cpu"] // (heads * groups * max(centres, width)))
    return [(start, min(start + step, total)) for start in range(0, total, step)]


if __name__ == "__main__":
    draw_example("pq_cache")
