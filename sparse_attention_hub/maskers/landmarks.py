"""Landmarks: the pages of keys whose mean key scores highest.

MoBA (https://arxiv.org/abs/2502.13189), InfLLM-v2 (https://arxiv.org/abs/2509.24663), the landmarks of ShadowKV
(https://arxiv.org/abs/2410.21465).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import dot_all
from ..search_space import Choice
from .base import draw_example, register_masker
from .codes import group_shares
from .inputs import AttentionInputs
from .pages import PageMasker, PagesConfig, cut_pages


@dataclass
class LandmarksConfig(PagesConfig):
    """heavy_size: keys to keep, int (tokens) or float (fraction of N), in whole pages, one at least. page_size: keys per page."""

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return super().get_search_space(task_name) | {"page_size": Choice([8, 16, 32, 64])}


@register_masker(LandmarksConfig)
class LandmarksMasker(PageMasker[LandmarksConfig]):
    """A page's landmark is the mean of its keys. Each query head's scores of the landmarks become shares by a softmax; the query
    heads of a kv head attend to the same pages, those with the highest shares summed over the heads, as in InfLLM-v2.

    The state keeps the landmarks of complete pages, in the keys' type.
    """

    def summarise(self, keys: Tensor, allowed: Tensor | None, starts: list[int], first: int, last: int) -> Tensor:
        wide = torch.promote_types(keys.dtype, torch.float32)
        place = allowed, starts, self.config.page_size, first, last, 0.0
        ones = torch.ones((keys.shape[0], 1, keys.shape[2], 1), dtype=wide, device=keys.device)
        sums, counts = cut_pages(keys, *place).sum(3, dtype=wide), cut_pages(ones, *place).sum(3)
        return (sums / counts.clamp(min=1)).to(keys.dtype)

    def score(self, inputs: AttentionInputs, summaries: Tensor) -> Tensor:
        return dot_all(inputs.queries, summaries, inputs.scaling)

    def page_scores(self, inputs: AttentionInputs) -> tuple[list[int], Tensor]:
        starts, scores = super().page_scores(inputs)
        return starts, group_shares(scores, inputs.kv_heads)

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        return 0.5 / self.config.page_size  # a landmark is as large as a key


if __name__ == "__main__":
    draw_example("landmarks")
