"""KeyDiff: the context's keys least like the mean key (https://arxiv.org/abs/2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .base import TopKConfig, draw_example, register_masker
from .context_summary import ContextSummary
from .eviction import Eviction


@dataclass
class KeyDiffConfig(TopKConfig):
    """heavy_size: keys of the context that each kv head keeps, int (tokens) or float (fraction of the context)."""


@register_masker(KeyDiffConfig)
class KeyDiffMasker(Eviction[KeyDiffConfig]):
    """Importance: minus the cosine between the key and the mean of the keys' directions."""

    def importance(self, keys: Tensor, allowed: Tensor, summary: ContextSummary) -> Tensor:
        anchor = F.normalize(keys, dim=-1).sum(2, keepdim=True)  # the cosine does not depend on its length
        return -F.cosine_similarity(keys, anchor, dim=-1)


if __name__ == "__main__":
    draw_example("key_diff")
