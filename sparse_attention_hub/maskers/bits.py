"""Bits packed into 32-bit words, and counting them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_bits(bits: Tensor) -> Tensor:
    """bool (..., n) to int32 words (..., ceil(n / 32)); bits past n are 0."""
    words = -(-bits.shape[-1] // 32)
    padded = F.pad(bits, (0, 32 * words - bits.shape[-1])).view(*bits.shape[:-1], words, 32).to(torch.int32)
    weights = torch.ones(32, dtype=torch.int32, device=bits.device) << torch.arange(32, dtype=torch.int32, device=bits.device)
    packed: Tensor = (padded * weights).sum(-1, dtype=torch.int32)
    return packed


def popcount(words: Tensor) -> Tensor:
    """How many bits of each int32 word are 1. Works in place: pass a tensor that is not needed any more."""
    # Sums of neighbouring bits, pairs, nibbles, then all four bytes by one multiplication. Each mask clears what an
    # arithmetic shift drags in.
    words -= (words >> 1) & 0x55555555
    high = (words >> 2) & 0x33333333
    words &= 0x33333333
    words += high
    words += words >> 4
    words &= 0x0F0F0F0F
    words *= 0x01010101
    words >>= 24
    words &= 0x3F
    return words
