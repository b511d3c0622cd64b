"""Codes of keys: numbers of few bits, signs packed into words, and scores of keys from codes or of a whole group of queries."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.reference import group_scores
from ..lists import as_arrays, uses_loops


def pseudo_quantise(x: Tensor, bits: int) -> Tensor:
    """x (..., C) rounded to 2^bits levels between each vector's minimum and maximum: float32; x itself from 16 bits on."""
    if bits >= 16:
        return x
    levels, scale, low = _levels(x, bits)
    rounded: Tensor = levels / scale + low
    return rounded


def _levels(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(levels (..., C), levels per unit (..., 1), minimum (..., 1)) of x (..., C), float32."""
    x = x.float()
    low = x.amin(-1, keepdim=True)
    spread = x.amax(-1, keepdim=True) - low
    scale = (2**bits - 1) / spread.masked_fill(spread == 0, 1.0)
    return ((x - low) * scale).round_().clamp_(0, 2**bits - 1), scale, low


def packs(keys: Tensor, bits: int) -> bool:
    """Whether rounded numbers are kept packed. On a CPU they stay floats: contexts are shorter, and unpacking costs each step."""
    return bits < 16 and not uses_loops(keys)


def pack_levels(x: Tensor, bits: int) -> Tensor:
    """x (..., g, C) rounded as `pseudo_quantise` does, bits < 16, in bytes (..., n): minimum and scale of each vector as float32,
    then its levels of 1, 2, 4, 8 or 16 bits."""
    levels, scale, low = _levels(x, bits)
    flat = levels.flatten(-2).to(torch.uint8) if bits <= 8 else levels.flatten(-2).to(torch.int16).view(torch.uint8)
    shifts = _shifts(bits, x.device)
    # Whole words, so that minima and scales can be read in place.
    flat = F.pad(flat, (0, -flat.shape[-1] % (4 * len(shifts)))).unflatten(-1, (-1, len(shifts)))
    packed = torch.sum(flat << shifts, -1, dtype=torch.uint8)
    return torch.cat([torch.cat([low, scale], -1).flatten(-2).view(torch.uint8), packed], -1)


def unpack_levels(codes: Tensor, groups: int, channels: int, bits: int) -> Tensor:
    """What `pack_levels` packed, as `pseudo_quantise` gives it: float32 (..., groups, channels)."""
    ends = codes[..., : 8 * groups].view(torch.float32).unflatten(-1, (groups, 2))
    packed, shifts = codes[..., 8 * groups :], _shifts(bits, codes.device)
    if bits <= 8:
        levels = ((packed.unsqueeze(-1) >> shifts) & (2 ** (8 // len(shifts)) - 1)).flatten(-2)
    else:
        levels = packed.view(torch.int16)
    levels = levels[..., : groups * channels]
    rounded: Tensor = levels.reshape(*levels.shape[:-1], groups, channels).float() / ends[..., 1:] + ends[..., :1]
    return rounded


def _shifts(bits: int, device: torch.device) -> Tensor:
    """Where in a byte the levels of `bits` bits stand, each in 1, 2, 4 or 8 of its bits; of more than 8 bits, their bytes."""
    width = next((width for width in (1, 2, 4) if width >= bits), 8)
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)


def pack_bits(bits: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """bool (..., n) to words of an integer type, (..., ceil(n / bits of a word)); bits past n are 0."""
    width = torch.iinfo(dtype).bits
    words = -(-bits.shape[-1] // width)
    packed = torch.empty((*bits.shape[:-1], words), dtype=dtype, device=bits.device)
    if uses_loops(bits):
        from ..loops.codes import pack_bits as pack

        pack(*as_arrays(bits.reshape(-1, bits.shape[-1]), packed.view(-1, words)))
        return packed
    padded = F.pad(bits, (0, width * words - bits.shape[-1])).view(*bits.shape[:-1], words, width).to(dtype)
    return torch.sum(padded << torch.arange(width, dtype=dtype, device=bits.device), -1, dtype=dtype, out=packed)


def popcount(words: Tensor) -> Tensor:
    """How many bits of each int32 word are 1: sums of neighbouring bits, pairs, nibbles, then all four bytes at once."""
    # Each mask clears what an arithmetic shift drags in.
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return (words * 0x01010101 >> 24) & 0x3F


def score_bits(queries: Tensor, keys: Tensor) -> Tensor:
    """Minus the number of bits that differ: int32 words queries (B, h, G, Q, words) and keys (B, h, N, networks, words) to
    float32 (B, h, G, Q, N). networks is G, or 1 where a group's query heads share the words of keys."""
    if uses_loops(keys):
        from ..loops.codes import score_bits as score

        scores = torch.empty((*queries.shape[:4], keys.shape[2]), dtype=torch.float32)
        score(*as_arrays(queries, keys, scores))
        return scores
    differ = torch.zeros((), dtype=torch.int32, device=keys.device)
    for own, others in zip(queries.unbind(-1), keys.transpose(2, 3).unbind(-1), strict=True):
        differ = differ + popcount(own.unsqueeze(-1) ^ others.unsqueeze(3))
    return differ.neg().float()


def sum_codes(table: Tensor, codes: Tensor) -> Tensor:
    """Each key's sum of its centres' scores: table (B, Hkv, R, G, C) and codes (B, Hkv, N, G) to (B, Hkv, R, N)."""
    if uses_loops(codes):
        from ..loops.codes import sum_codes as add

        out = torch.empty((*table.shape[:3], codes.shape[2]))
        add(*as_arrays(table, codes, out))
        return out
    shape = (*table.shape[:3], codes.shape[2])
    each = (table[:, :, :, g].gather(-1, codes[:, :, None, :, g].long().expand(shape)) for g in range(codes.shape[3]))
    return functools.reduce(torch.add, each)


def score_channels(queries: Tensor, keys: Tensor, channels: Tensor) -> Tensor:
    """q.k over the channels int64 (B, Hkv, Q, r) alone, those of each row and kv head: queries (B, H, Q, D), float32 or wider, and
    keys (B, Hkv, N, D) to (B, H, Q, N)."""
    batch, kv_heads, total, _ = keys.shape
    grouped = queries.unflatten(1, (kv_heads, -1))
    if queries.shape[2] == 1 and uses_loops(keys):  # with more rows a matrix product is faster
        from ..loops.codes import score_channels as score
        from ..loops.compiled import as_bits

        own = grouped[:, :, :, 0].gather(-1, channels.expand(-1, -1, grouped.shape[2], -1))
        scores = queries.new_empty((batch, kv_heads, grouped.shape[2], total))
        score(*as_arrays(own, channels[:, :, 0]), as_bits(keys), *as_arrays(scores))
        return scores.view(batch, -1, 1, total)
    others = torch.ones((batch, kv_heads, *queries.shape[2:]), dtype=torch.bool, device=keys.device)
    others.scatter_(-1, channels, False)
    return group_scores(grouped.masked_fill(others.unsqueeze(2), 0.0).flatten(1, 2), keys, 1.0)


def group_shares(scores: Tensor, kv_heads: int) -> Tensor:
    """The softmax of scores (B, H, Q, N), summed over the query heads of each kv head: (B, Hkv, Q, N); -inf stays -inf."""
    grouped = scores.unflatten(1, (kv_heads, -1))
    closed = grouped[:, :, 0] == float("-inf")
    shares: Tensor = grouped.softmax(-1).sum(2).masked_fill_(closed, float("-inf"))
    return shares


def kept_channels(size: int | float, dim: int) -> int:
    """How many of `dim` channels a size keeps: an int at most all, a fraction floored, at least 1."""
    return min(size, dim) if isinstance(size, int) else max(1, int(size * dim))
