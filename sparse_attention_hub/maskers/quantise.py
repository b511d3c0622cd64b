"""Numbers rounded to a few levels, as a cache of few bits would hold them."""

from __future__ import annotations

from torch import Tensor


def pseudo_quantise(x: Tensor, bits: int) -> Tensor:
    """Round each vector along the last dim to 2^bits levels between its own minimum and maximum, and back.

    x: (..., C). Returns float32 of the same shape; 16 bits or more give x unchanged, in its own dtype.
    """
    if bits >= 16:
        return x
    x = x.float()
    low = x.amin(-1, keepdim=True)
    spread = x.amax(-1, keepdim=True) - low
    scale = (2**bits - 1) / spread.masked_fill(spread == 0, 1.0)
    levels: Tensor = ((x - low) * scale).round_().clamp_(0, 2**bits - 1)
    rounded: Tensor = levels / scale + low
    return rounded
