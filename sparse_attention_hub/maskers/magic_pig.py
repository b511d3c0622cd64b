"""MagicPig: keys sampled by locality-sensitive hashing (MagicPIG, https://arxiv.org/abs/2410.16179)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import group_scores
from ..lists import as_arrays, expand_heads, from_flags, uses_loops
from ..mask import Mask
from ..search_space import Choice
from .base import Masker, MaskerConfig, check_flag, check_int, draw_example, register_masker
from .codes import pack_bits
from .inputs import AttentionInputs

# Types of a table's packed bits, the narrowest first.
WORDS = (torch.uint8, torch.int16, torch.int32, torch.int64)
# Floats in the largest temporary of hashing: 32 MB.
BLOCK = 2**23


@dataclass
class MagicPigConfig(MaskerConfig):
    """lsh_l: hash tables. lsh_k: bits per table, 1 to 64. center: hash keys and queries relative to the mean key.

    seed: of the projections; the layer's number is added. min_matches: in how many tables a key must share
    the query's bucket, 1 or 2 (the paper's rule).
    """

    lsh_l: int
    lsh_k: int
    center: bool = True
    seed: int = 42
    min_matches: int = 1

    def __post_init__(self) -> None:
        self.lsh_l = check_int("lsh_l", self.lsh_l, 1)
        self.lsh_k = check_int("lsh_k", self.lsh_k, 1, 64)  # a table's bits are packed into one integer
        self.center = check_flag("center", self.center)
        self.seed = check_int("seed", self.seed, 0)
        self.min_matches = check_int("min_matches", self.min_matches, 1, 2)
        if self.min_matches > self.lsh_l:
            raise ValueError(f"min_matches must be <= lsh_l = {self.lsh_l}, got {self.min_matches}")

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return {"lsh_l": Choice([8, 16, 32, 64, 128]), "lsh_k": Choice([4, 6, 8, 10, 12]), "min_matches": Choice([1, 2])}


@dataclass(frozen=True)
class HashFit:
    """float32. mean of the context's keys (B, Hkv, 1, D), zero if not centred; norm (B, Hkv, 1), their largest distance from it;
    projections (D + 1, lsh_l * lsh_k), table after table; of several layers (B, 1, D + 1, lsh_l * lsh_k)."""

    mean: Tensor
    norm: Tensor
    projections: Tensor


@register_masker(MagicPigConfig)
class MagicPigMasker(Masker[MagicPigConfig]):
    """A key k is hashed as the unit vector (k - mean, sqrt(M^2 - |k - mean|^2)) / M, a query as (q - mean, 0) / |q - mean|, so
    that their angle falls with the score. Bits are signs of random projections. A residual key is attended if it shares all
    bits of at least `min_matches` of the tables with the query; its p is the probability of that for their angle theta:
    with c = (1 - theta / pi)^K, 1 - (1 - c)^L for one match, less L c (1 - c)^(L - 1) for two.

    Mean and M are those of the context's keys, per item and kv head, then frozen. A later key with a norm above M is hashed as
    if M were its norm: its p still fits its bits, but its angle no longer falls with its norm.
    The choice depends on the config's seed, not on the call's. No budget chooses all keys.
    """

    is_sampling = True
    keeps_to_allowed = True
    score_bytes = (34, 27)  # it depends on how many keys collide
    code_fields = ("lsh_l", "lsh_k", "center", "seed")

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        fitted, signatures = self.codes(inputs)
        shifted = inputs.queries.float() - expand_heads(fitted.mean, inputs.shape[1])
        hits = self._hits(self._signature(shifted, torch.zeros_like(shifted[..., 0]), fitted), signatures).view(inputs.shape)
        found = from_flags(hits & expand_heads(mask.residual(inputs.allowed), inputs.shape[1]))
        probability = self._probability(_cosines(inputs, shifted, fitted, found.indices))
        return mask.union(inputs.mask(found._replace(probability=probability.float()), mask))

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        return self.config.lsh_l * self.config.lsh_k / 8 / (2 * inputs.keys.shape[-1] * inputs.keys.element_size())

    def fit(self, keys: Tensor, allowed: Tensor | None, layer_idx: int) -> HashFit:
        batch, heads, total, dim = keys.shape
        mean = torch.zeros((batch, heads, 1, dim), device=keys.device)
        norm = torch.ones((batch, heads, 1), device=keys.device)
        # One item and head at a time: no float32 copy of all keys, and sums that no neighbour or padding can change.
        for item, head in itertools.product(range(batch), range(heads)):
            points = keys[item, head, slice(None) if allowed is None else allowed[item]].float()
            if len(points) == 0:
                continue
            if self.config.center:
                mean[item, head, 0] = points.mean(0)
            norm[item, head] = (points - mean[item, head]).norm(dim=-1).max().clamp(min=1e-12)
        generator = torch.Generator().manual_seed(self.config.seed + layer_idx)
        projections = torch.randn((dim + 1, self.config.lsh_l * self.config.lsh_k), generator=generator)
        return HashFit(mean, norm, projections.to(keys.device))

    def join_fits(self, fits: list[HashFit]) -> HashFit:
        means, norms = torch.cat([fit.mean for fit in fits]), torch.cat([fit.norm for fit in fits])
        return HashFit(means, norms, torch.stack([fit.projections for fit in fits]).unsqueeze(1))

    def encode(self, keys: Tensor, fitted: HashFit, layer_idx: int) -> Tensor:
        """Signatures of keys (B, Hkv, n, D): (B, Hkv, n, L)."""
        step = max(1, BLOCK // (keys.shape[0] * keys.shape[1] * self.config.lsh_l * self.config.lsh_k))
        parts = []
        for part in torch.split(keys, step, 2):
            centred = part.float() - fitted.mean
            extra = (fitted.norm.square() - centred.norm(dim=-1).square()).clamp(min=0).sqrt()
            parts.append(self._signature(centred, extra, fitted))
        return torch.cat(parts, 2)

    def _signature(self, points: Tensor, extra: Tensor, fitted: HashFit) -> Tensor:
        """Signs of the projected vectors (points, extra): (B, h, n, D) and (B, h, n) to a word per table, (B, h, n, L)."""
        bits = points @ fitted.projections[..., :-1, :] + extra.unsqueeze(-1) * fitted.projections[..., -1:, :] > 0
        return pack_tables(bits, self.config.lsh_k)

    def _hits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Keys that share enough buckets with a query: signatures of both to bool (B, Hkv, rows of the group, N)."""
        queries = queries.reshape(*keys.shape[:2], -1, keys.shape[-1])
        shape = (*queries.shape[:3], keys.shape[2])
        if uses_loops(keys):
            from ..loops.codes import find_matches

            hits = torch.empty(shape, dtype=torch.bool)
            find_matches(*as_arrays(queries, keys, self.config.min_matches, hits))
            return hits
        counts = torch.zeros(shape, dtype=torch.int16, device=keys.device)
        tables = keys.movedim(-1, 0).contiguous()
        for own, others in zip(queries.unbind(-1), tables, strict=True):  # one at a time: less memory
            counts += own.unsqueeze(-1) == others.unsqueeze(2)
        return counts >= self.config.min_matches

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


def pack_tables(bits: Tensor, per_table: int) -> Tensor:
    """Bits of all tables, bool (..., L * per_table), to a word per table, (..., L)."""
    dtype = next(word for word in WORDS if torch.iinfo(word).bits >= per_table)
    return pack_bits(bits.unflatten(-1, (-1, per_table)), dtype).squeeze(-1)


def _cosines(inputs: AttentionInputs, shifted: Tensor, fitted: HashFit, indices: Tensor) -> Tensor:
    """Cosines between the hashed vectors of queries, given without their mean in float32, and of keys: (B, H, Q, K) as indices."""
    batch, heads = inputs.shape[:2]
    safe = indices.clamp(min=0).long()
    if inputs.shape[2] == 1:
        places = safe.view(batch * inputs.kv_heads, -1)  # one kv head at a time: on a CPU a tenth of the time of gather
        rows = [own.index_select(0, place) for own, place in zip(inputs.keys.flatten(0, 1), places, strict=True)]
        picked = torch.stack(rows).view(batch, inputs.kv_heads, -1, inputs.keys.shape[3]).float() - fitted.mean
        picked = picked.view(batch, heads, -1, inputs.keys.shape[3])
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
    draw_example("magic_pig")
