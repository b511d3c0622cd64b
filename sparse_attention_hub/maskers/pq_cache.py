"""PQCache: top-k by scores from product-quantised keys (https://arxiv.org/abs/2407.12820)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..mask import Mask
from ..search_space import Choice
from .base import Masker, TopKConfig, check_int, draw_example, register_masker
from .codes import sum_codes
from .inputs import AttentionInputs
from .k_means import allowed_keys, assign, blocks, k_means

METRICS = ("euclidean", "ip")


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
    in_graphs = True
    code_fields = ("pq_group_factor", "pq_bits", "kmeans_iter", "init_offset", "metric", "seed")

    @property
    def code_dtype(self) -> torch.dtype:
        bits = self.config.pq_bits
        return torch.uint8 if bits <= 8 else torch.int16 if bits <= 15 else torch.int32

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        scores = self.shared(inputs, lambda: self._scores(inputs))
        whole = inputs.resolve(self.config.heavy_size) >= inputs.layout.totals
        # Keys inside the offset are not chosen, unless the budget is all keys.
        offsets, most = inputs.bounded(self.config.init_offset)
        offset = inputs.layout.first_keys(offsets.masked_fill(whole, 0), most) if self.config.init_offset else None
        closed = mask if offset is None else mask.union(offset)
        return mask.union(inputs.choose_top(scores, closed, self.config.heavy_size))

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        code_bytes = self.config.pq_group_factor * self.config.pq_bits / 8
        return code_bytes / (2 * inputs.keys.shape[-1] * inputs.keys.element_size())

    def fit(self, keys: Tensor, allowed: Tensor | None, layer_idx: int) -> PQFit:
        """keys (B, Hkv, N, D), allowed bool (B, N) or None. ValueError if pq_group_factor does not divide D."""
        groups, dim = self.config.pq_group_factor, keys.shape[-1]
        if dim % groups:
            raise ValueError(f"pq_group_factor must divide the head dimension {dim}, got {groups}")
        of_items = [None] * keys.shape[0] if allowed is None else allowed.unbind()
        fits = [self._fit_item(allowed_keys(*item), layer_idx) for item in zip(keys.unbind(), of_items, strict=True)]
        square = torch.stack([square for _, square in fits]) if self.config.metric == "ip" else None
        return PQFit(torch.stack([centroids for centroids, _ in fits]), square)

    def join_fits(self, fits: list[PQFit]) -> PQFit:
        squares = [fit.square for fit in fits if fit.square is not None]
        return PQFit(torch.cat([fit.centroids for fit in fits]), torch.cat(squares) if squares else None)

    def encode(self, keys: Tensor, fitted: PQFit, layer_idx: int) -> Tensor:
        batch, heads, total, _ = keys.shape
        codes = torch.empty((batch, heads, total, self.config.pq_group_factor), dtype=self.code_dtype, device=keys.device)
        for item in range(batch):
            square = None if fitted.square is None else fitted.square[item]
            assign(keys[item], partial(self._points, square=square), fitted.centroids[item], codes[item])
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

    def _points(self, keys: Tensor, square: Tensor | None) -> Tensor:
        """Sub-vectors in float32: keys (Hkv, n, D) to (Hkv, G, n, D/G), for "ip" with sqrt(square - |x|^2) added."""
        points = keys.reshape(*keys.shape[:2], self.config.pq_group_factor, -1).transpose(1, 2).float()
        if square is None:
            return points
        extra: Tensor = (square.unsqueeze(-1) - points.square().sum(-1)).clamp(min=0).sqrt()
        return torch.cat([points, extra.unsqueeze(-1)], -1)

    def _fit_item(self, keys: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Of one item's allowed keys (Hkv, M, D): centres (Hkv, G, 2^bits, w) and the largest square (Hkv, G)."""
        config, groups = self.config, self.config.pq_group_factor
        # Keys inside the offset are not clustered, unless there are no others.
        keys = keys[:, config.init_offset :] if keys.shape[1] > config.init_offset else keys
        heads, total, dim = keys.shape
        centres = 2**config.pq_bits
        square = torch.zeros((heads, groups), device=keys.device)
        if total == 0:
            return square.new_zeros((heads, groups, centres, dim // groups + (config.metric == "ip"))), square
        for start, stop in blocks(total, square.new_empty((heads, groups, 1, dim // groups))):
            square = torch.maximum(square, self._points(keys[:, start:stop], None).square().sum(-1).amax(-1))
        shift = square if config.metric == "ip" else None
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + layer_idx)
        points = partial(self._points, square=shift)
        return k_means(keys, points, centres, config.kmeans_iter, generator), square


if __name__ == "__main__":
    draw_example("pq_cache")
