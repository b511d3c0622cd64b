"""What a caller knows of a call's scores already."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Known(NamedTuple):
    """scores (B, H, Q, N): logits with softcap and bias. terms (B, H, Q, N): exp(scores - highest), highest (B, H, Q): the
    highest score of each row, 0 where it is -inf; both or neither. biased: the scores hold a bias, so queries and keys alone do
    not tell them."""

    scores: Tensor | None = None
    terms: Tensor | None = None
    highest: Tensor | None = None
    biased: bool = False
