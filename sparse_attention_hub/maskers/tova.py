"""TOVA: the context's keys that its last query attends to (https://arxiv.org/abs/2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import TopKConfig, draw_example, register_masker
from .context_summary import ContextSummary
from .eviction import Eviction
from .snap_kv import window_attention


@dataclass
class TOVAConfig(TopKConfig):
    """heavy_size: keys of the context that are kept, int (tokens) or float (fraction of the context)."""


@register_masker(TOVAConfig)
class TOVAMasker(Eviction[TOVAConfig]):
    """Importance: attention of the last query, mean over all heads, which keep the same keys; its own key is kept first."""

    observes = ("queries",)

    def importance(self, keys: Tensor, allowed: Tensor, summary: ContextSummary) -> Tensor:
        return window_attention(keys, allowed, summary, 1).mean(1, keepdim=True)


if __name__ == "__main__":
    draw_example("tova")
