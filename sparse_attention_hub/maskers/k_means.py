"""Lloyd's k-means, for all heads of an item at once: PQCache's codes, and clusters of whole keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Floats in the largest temporary of clustering and coding: on a CPU, where it should stay in the cache, and on a GPU.
BLOCKS = {"cpu": 2**20, "gpu": 2**23}
#: Keys (Hkv, n, D) as points in float32, (Hkv, G, n, w): G = clusterings of a head that are independent.
ToPoints = Callable[[Tensor], Tensor]


def k_means(
    keys: Tensor,
    to_points: ToPoints,
    centres: int,
    iterations: int,
    generator: torch.Generator,
    seen: Callable[[Tensor], Tensor] = lambda centroids: centroids,
) -> Tensor:
    """Centroids (Hkv, G, centres, w) of the points of keys (Hkv, N, D), N >= 1. They start as the first points of a random
    permutation, repeated if there are too few.

    seen: what of centroids is compared with points to find the nearest. It ends early where centroids stop moving.
    """
    total = keys.shape[1]
    first = torch.randperm(total, generator=generator)[:centres].repeat(-(-centres // total))[:centres]
    centroids = to_points(keys[:, first.to(keys.device, non_blocking=True)])
    for _ in range(iterations):
        sums, counts = centroids.new_zeros(centroids.shape), centroids.new_zeros(centroids.shape[:3])
        for start, stop in blocks(total, centroids):
            own = to_points(keys[:, start:stop])
            _add_members(own, _nearest(own, seen(centroids)), sums, counts)
        spare = torch.randint(total, (centres,), generator=generator).to(keys.device, non_blocking=True)
        # A centre without keys moves to a random key.
        counts = counts.unsqueeze(-1)
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), to_points(keys[:, spare]))
        drift = (moved - centroids).norm(dim=-1).sum(-1)
        centroids = moved
        if float(drift.max()) < 1e-2:
            break
    return centroids


def assign(keys: Tensor, to_points: ToPoints, centroids: Tensor, out: Tensor) -> None:
    """The index of the nearest of the centroids (Hkv, G, C, w) to each point of keys (Hkv, N, D), into `out` (Hkv, N, G)."""
    for start, stop in blocks(keys.shape[1], centroids):
        out[:, start:stop] = _nearest(to_points(keys[:, start:stop]), centroids).transpose(1, 2)


def allowed_keys(keys: Tensor, allowed: Tensor | None) -> Tensor:
    """The allowed keys of one item: keys (Hkv, N, D), allowed bool (N,) or None = all, to (Hkv, M, D)."""
    if allowed is None:
        return keys
    places = allowed.nonzero().squeeze(-1)
    together = places.numel() and int(places[-1] - places[0]) + 1 == places.numel()
    # Padding on one side leaves a slice, which costs no copy.
    return keys[:, int(places[0]) : int(places[-1]) + 1] if together else keys[:, places]


def blocks(total: int, centroids: Tensor) -> list[tuple[int, int]]:
    """Ranges of keys whose distances to all centres (Hkv, G, C, w) fit into one temporary."""
    heads, groups, centres, width = centroids.shape
    step = max(1, BLOCKS["gpu" if centroids.is_cuda else "cpu"] // (heads * groups * max(centres, width)))
    return [(start, min(start + step, total)) for start in range(0, total, step)]


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
