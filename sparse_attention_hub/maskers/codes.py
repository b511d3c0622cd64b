"""Codes of keys: numbers of few bits, signs packed into words, and scores of keys from codes."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..lists import as_arrays, uses_loops


def pseudo_quantise(x: Tensor, bits: int) -> Tensor:
    """x (..., C) rounded to 2^bits levels between each vector's minimum and maximum: float32; x itself from 16 bits on."""
    if bits >= 16:
        return x
    x = x.float()
    low = x.amin(-1, keepdim=True)
    spread = x.amax(-1, keepdim=True) - low
    scale = (2**bits - 1) / spread.masked_fill(spread == 0, 1.0)
    levels: Tensor = ((x - low) * scale).round_().clamp_(0, 2**bits - 1)
    rounded: Tensor = levels / scale + low
    return rounded


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
