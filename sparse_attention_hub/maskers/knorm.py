"""Knorm: the context's keys with the smallest norms, which receive most attention (https://arxiv.org/abs/2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import TopKConfig, draw_example, register_masker
from .context_summary import ContextSummary
from .eviction import Eviction


@dataclass
class KnormConfig(TopKConfig):
    """heavy_size: keys of the context that each kv head keeps, int (tokens) or float (fraction of the context)."""


@register_masker(KnormConfig)
class KnormMasker(Eviction[KnormConfig]):
    """Importance: minus the norm of the key."""

    def importance(self, keys: Tensor, allowed: Tensor, summary: ContextSummary) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(keys, dim=-1)
        return -norms


if __name__ == "__main__":
    draw_example("knorm")
