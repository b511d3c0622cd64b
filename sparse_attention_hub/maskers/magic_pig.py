"""MagicPig: keys sampled by locality-sensitive hashing (MagicPIG, https://arxiv.org/abs/2410.16179)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.reference import group_scores
from ..lists import expand_heads
from ..mask import Mask
from ..search_space import Choice
from .base import Masker, MaskerConfig, check_flag, check_int, register_masker
from .inputs import AttentionInputs

PACKINGS = ("int64", "float32")
# Floats in the largest temporary of hashing: 32 MB.
BLOCK = 2**23


@dataclass
class MagicPigConfig(MaskerConfig):
    """lsh_l: hash tables. lsh_k: bits of a table. center: hash keys and queries relative to the mean key.

    packing: "int64" packs a table's bits into one integer, so lsh_k is at most 64; "float32" has no such limit and chooses the
    same keys. seed: of the projections, with the layer's number added. min_matches: tables in which a key must share the
    query's bucket, 1 or 2 (the paper's rule).
    """

    lsh_l: int
    lsh_k: int
    center: bool = True
    packing: str = "int64"
    seed: int = 42
    min_matches: int = 1

    def __post_init__(self) -> None:
        self.lsh_l = check_int("lsh_l", self.lsh_l, 1)
        self.lsh_k = check_int("lsh_k", self.lsh_k, 1)
        self.center = check_flag("center", self.center)
        if self.packing not in PACKINGS:
            raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, got {self.packing!r}")
        if self.packing == "int64" and self.lsh_k > 64:
            raise ValueError(f"lsh_k must be <= 64 with packing int64, got {self.lsh_k}")
        self.seed = check_int("seed", self.seed, 0)
        self.min_matches = check_int("min_matches", self.min_matches, 1, 2)
        if self.min_matches > self.lsh_l:
            raise ValueError(f"min_matches must be <= lsh_l = {self.lsh_l}, got {self.min_matches}")

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return {"lsh_l": Choice([8, 16, 32, 64, 128]), "lsh_k": Choice([4, 6, 8, 10, 12]), "min_matches": Choice([1, 2])}


@dataclass(frozen=True)
class HashFit:
    """mean: of the context's keys, float32 (B, Hkv, 1, D), zero if not centred. norm: the largest of their norms around it,
    (B, Hkv, 1). projections: float32 (D + 1, lsh_l * lsh_k), table after table."""

    mean: Tensor
    norm: Tensor
    projections: Tensor


@register_masker(MagicPigConfig)
class MagicPigMasker(Masker[MagicPigConfig]):
    """A key k is hashed as the unit vector (k - mean, sqrt(M^2 - |k - mean|^2)) / M, a query as (q - mean, 0) / |q - mean|, so
    that their angle falls with the score. Bits are signs of random projections. A residual key is attended if it shares all
    bits of at least `min_matches` of the tables with the query; its p is the probability of that for their angle theta:
    with c = (1 - theta / pi)^K, 1 - (1 - c)^L for one match, less L c (1 - c)^(L - 1) for two.

    Mean and M are those of the context's keys, an item and kv head each, then frozen. A later key with a norm above M is
    hashed as if M were its norm: its bits and its p stay of one kind, only the angle no longer falls with the norm.
    The choice depends on the config's seed, not on the call's. There is no full budget. Signatures are (B, Hkv, N, words).
    """

    is_sampling = True
    keeps_to_allowed = True
    code_fields = ("lsh_l", "lsh_k", "center", "seed")

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        fitted, signatures = self.codes(inputs)
        shifted = inputs.queries.float() - expand_heads(fitted.mean, inputs.shape[1])
        hits = self._hits(inputs, signatures, self._signature(shifted, torch.zeros_like(shifted[..., 0]), fitted.projections))
        found = inputs.mask(hits & expand_heads(mask.residual(inputs.allowed), inputs.shape[1])).lists()
        probability = self._probability(_cosines(inputs, shifted, fitted, found.indices))
        return mask.union(inputs.mask(found._replace(probability=probability.float()), mask))

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        return self.config.lsh_l * self.config.lsh_k / 8 / (2 * inputs.keys.shape[-1] * inputs.keys.element_size())

    def fit(self, keys: Tensor, allowed: Tensor | None, layer_idx: int) -> HashFit:
        batch, heads, total, dim = keys.shape
        mean, norm = torch.zeros((batch, heads, 1, dim)), torch.ones((batch, heads, 1))
        mean, norm = mean.to(keys.device), norm.to(keys.device)
        # One item and head at a time: no float32 copy of all keys, and sums that no neighbour or padding can change.
        for item in range(batch):
            own = slice(None) if allowed is None else allowed[item]
            for head in range(heads):
                points = keys[item, head, own].float()
                if points.shape[0] == 0:
                    continue
                if self.config.center:
                    mean[item, head, 0] = points.mean(0)
                norm[item, head] = (points - mean[item, head]).norm(dim=-1).max().clamp(min=1e-12)
        generator = torch.Generator().manual_seed(self.config.seed + layer_idx)
        projections = torch.randn((dim + 1, self.config.lsh_l * self.config.lsh_k), generator=generator)
        return HashFit(mean, norm, projections.to(keys.device))

    def encode(self, keys: Tensor, fitted: HashFit, layer_idx: int) -> Tensor:
        step = max(1, BLOCK // (keys.shape[0] * keys.shape[1] * self.config.lsh_l * self.config.lsh_k))
        parts = []
        for start in range(0, keys.shape[2], step):
            centred = keys[:, :, start : start + step].float() - fitted.mean
            norms = centred.norm(dim=-1)
            extra = (fitted.norm.square() - norms.square()).clamp(min=0).sqrt()
            parts.append(self._signature(centred, extra, fitted.projections))
        return torch.cat(parts, 2)

    def _signature(self, points: Tensor, extra: Tensor, projections: Tensor) -> Tensor:
        """Packed signs of (points, extra): (B, h, n, D) and (B, h, n) to integers (B, h, n, words a table * L).

        Lengths do not matter to signs. Words are as narrow as the bits of a table permit.
        """
        bits = points @ projections[:-1] + extra.unsqueeze(-1) * projections[-1] > 0
        bits = bits.view(*bits.shape[:-1], self.config.lsh_l, self.config.lsh_k)
        words = []
        for first in range(0, self.config.lsh_k, 64):
            part = bits[..., first : first + 64]
            width = part.shape[-1]
            dtype = next(d for d, most in _WORDS if width <= most)
            word = torch.zeros(part.shape[:-1], dtype=dtype, device=part.device)
            for place in range(width):
                word |= part[..., place].to(dtype) << place
            words.append(word if self.config.lsh_k <= 64 else word.long())
        return torch.cat(words, -1)

    def _hits(self, inputs: AttentionInputs, keys: Tensor, queries: Tensor) -> Tensor:
        """Which keys share enough buckets with each query: bool (B, H, Q, N)."""
        batch, heads, rows, total = inputs.shape
        tables = self.config.lsh_l
        keys = keys.movedim(-1, 2).contiguous()
        queries = queries.reshape(batch, inputs.kv_heads, -1, queries.shape[-1])
        shape = (batch, inputs.kv_heads, queries.shape[2], total)
        if not keys.is_cuda:
            return torch.from_numpy(_matches(keys, queries, tables, shape) >= self.config.min_matches).view(inputs.shape)
        counts = torch.zeros(shape, dtype=torch.int16, device=keys.device)
        for table in range(tables):
            same = torch.ones((), dtype=torch.bool, device=keys.device)
            for word in range(table, keys.shape[2], tables):
                same = same & (keys[:, :, word].unsqueeze(2) == queries[..., word].unsqueeze(-1))
            counts += same
        return (counts >= self.config.min_matches).view(batch, heads, rows, total)

    def _probability(self, cosines: Tensor) -> Tensor:
        """Chance of enough matches: in float64, since c may be tiny. Never 0 for a key that did match."""
        tables, bits = self.config.lsh_l, self.config.lsh_k
        collide = (1 - cosines.double().clamp(-1, 1).arccos() / torch.pi) ** bits
        # log(1 - c) = -inf for c = 1 gives p = 1.
        missed = torch.log1p(-collide)
        p: Tensor = -torch.expm1(tables * missed)
        if self.config.min_matches == 2:
            p = p - tables * collide * torch.exp((tables - 1) * missed)
        return p.clamp(min=1e-12, max=1.0)


def _matches(keys: Tensor, queries: Tensor, tables: int, shape: tuple[int, int, int, int]) -> np.ndarray:
    """In how many tables each query (B, Hkv, R, words a table * L) and key (B, Hkv, words a table * L, N) share all bits:
    (B, Hkv, R, N). In NumPy, which compares and counts bytes fifteen times as fast as torch on a CPU."""
    own, others = keys.numpy()[:, :, None], queries.numpy()[..., None]
    counts = np.zeros(shape, dtype=np.uint8 if tables < 2**8 else np.uint32)
    same, more = np.empty(shape, dtype=bool), np.empty(shape, dtype=bool)
    for table in range(tables):
        np.equal(own[:, :, :, table], others[:, :, :, table], out=same)
        for word in range(table + tables, keys.shape[2], tables):
            same &= np.equal(own[:, :, :, word], others[:, :, :, word], out=more)
        counts += same.view(np.uint8)
    return counts


_WORDS = ((torch.uint8, 8), (torch.int16, 16), (torch.int32, 32), (torch.int64, 64))


def _cosines(inputs: AttentionInputs, shifted: Tensor, fitted: HashFit, indices: Tensor) -> Tensor:
    """Cosine between the hashed vectors of queries and some keys: indices (B, H, Q, K) to (B, H, Q, K).

    shifted: queries less the mean, float32 (B, H, Q, D).
    """
    batch, heads = inputs.shape[:2]
    safe = indices.clamp(min=0).long()
    if inputs.shape[2] == 1:
        places = safe.view(batch, inputs.kv_heads, -1, 1).expand(-1, -1, -1, inputs.keys.shape[3])
        picked = (inputs.keys.gather(2, places).float() - fitted.mean).view(batch, heads, -1, inputs.keys.shape[3])
        dots = shifted @ picked.transpose(-1, -2)
        lengths = picked.norm(dim=-1).unsqueeze(2)
    else:
        centred = inputs.keys.float() - fitted.mean
        dots = group_scores(shifted, centred, 1.0).gather(-1, safe)
        lengths = expand_heads(centred.norm(dim=-1), heads).unsqueeze(2).expand(inputs.shape).gather(-1, safe)
    longest = torch.maximum(lengths, expand_heads(fitted.norm, heads).unsqueeze(-1))
    cosines: Tensor = dots / (longest * shifted.norm(dim=-1, keepdim=True)).clamp(min=1e-30)
    return cosines


if __name__ == "__main__":
    from sparse_attention_hub.maskers.drawing import main

    main("magic_pig")
