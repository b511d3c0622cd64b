"""H2O: the heavy hitters, the context's keys that received most attention (https://arxiv.org/abs/2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import TopKConfig, draw_example, register_masker
from .context_summary import ContextSummary
from .eviction import Eviction


@dataclass
class H2OConfig(TopKConfig):
    """heavy_size: keys of the context that each kv head keeps, int (tokens) or float (fraction of the context).

    The paper spends as much on the most recent keys: put a LocalMaskerConfig before this one.
    """


@register_masker(H2OConfig)
class H2OMasker(Eviction[H2OConfig]):
    """Importance: attention received so far, mean over the queries that may attend to a key, so that old keys have no advantage,
    and over the heads of a group."""

    observes = ("attention",)

    def importance(self, keys: Tensor, allowed: Tensor, summary: ContextSummary) -> Tensor:
        return summary.received_per_row()[..., : keys.shape[2]]


if __name__ == "__main__":
    draw_example("h2o")
