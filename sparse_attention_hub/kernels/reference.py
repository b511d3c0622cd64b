"""The reference: masked attention over all keys in float32 or wider. Simple, slow, and what the others are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mask import Mask


def attend_reference(queries: Tensor, keys: Tensor, values: Tensor, mask: Mask, scaling: float) -> tuple[Tensor, Tensor]:
    """(output (B, Q, H, D), log-sum-exp (B, H, Q)), both float32 or wider. A row without keys gives 0 and -inf."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    groups = queries.shape[1] // keys.shape[1]
    keys = keys.to(wide).repeat_interleave(groups, 1)
    values = values.to(wide).repeat_interleave(groups, 1)
    probability = mask.inclusion_probability().to(wide)
    logits = queries.to(wide) @ keys.transpose(-1, -2) * scaling - probability.log()
    logits = logits.masked_fill(probability == 0, float("-inf"))
    top = logits.amax(-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    output = (weights / total.masked_fill(total == 0, 1.0)) @ values
    return output.transpose(1, 2), (total.log() + top).squeeze(-1)
