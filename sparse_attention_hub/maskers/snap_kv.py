"""SnapKV: the context's keys that its last queries attend to (https://arxiv.org/abs/2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..search_space import Choice
from .base import TopKConfig, check_int, draw_example, register_masker
from .context_summary import LAST_ROWS, ContextSummary
from .eviction import Eviction


@dataclass
class SnapKVConfig(TopKConfig):
    """heavy_size: keys of the context that each kv head keeps, int (tokens) or float (fraction of the context).

    window_size: the last queries, whose attention counts and whose own keys are kept first: 1 to 64. kernel_size: neighbouring
    keys over which attention is averaged, odd.
    """

    window_size: int = 32
    kernel_size: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        self.window_size = check_int("window_size", self.window_size, 1, LAST_ROWS)
        self.kernel_size = check_int("kernel_size", self.kernel_size, 1)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        sizes = {"window_size": Choice([8, 16, 32, 64]), "kernel_size": Choice([1, 3, 5, 7])}
        return super().get_search_space(task_name) | sizes


@register_masker(SnapKVConfig)
class SnapKVMasker(Eviction[SnapKVConfig]):
    """Importance: attention of the last `window_size` queries, mean over them, the heads of a group and `kernel_size` neighbours."""

    observes = ("queries",)
    code_fields = ("window_size", "kernel_size")

    def importance(self, keys: Tensor, allowed: Tensor, summary: ContextSummary) -> Tensor:
        attention = window_attention(keys, allowed, summary, self.config.window_size)
        attention = attention.view(*keys.shape[:2], -1, keys.shape[2]).mean(2)
        window = attention.isinf()
        size = self.config.kernel_size
        pooled = F.avg_pool1d(attention.masked_fill(window, 0.0), size, stride=1, padding=size // 2)
        return pooled.masked_fill(window, float("inf"))


def window_attention(keys: Tensor, allowed: Tensor, summary: ContextSummary, window: int) -> Tensor:
    """Attention of the last `window` queries to the context's keys, infinite for their own keys and 0 on padding: (B, H, n)."""
    attention, rows = summary.last_attention(keys, window)
    attention = attention.masked_fill(~allowed.unsqueeze(1), 0.0)
    attention[..., max(0, summary.length - rows) :] = float("inf")
    return attention


if __name__ == "__main__":
    draw_example("snap_kv")
