"""Local: a window of the most recent keys (Longformer, https://arxiv.org/abs/2004.05150; StreamingLLM's recent keys)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..mask import Mask
from ..search_space import LogUniform
from .base import Masker, MaskerConfig, check_size, register_masker
from .inputs import AttentionInputs


@dataclass
class LocalMaskerConfig(MaskerConfig):
    """window_size: the most recent keys, the row's own key included; int (tokens) or float (fraction of N)."""

    window_size: int | float

    def __post_init__(self) -> None:
        self.window_size = check_size("window_size", self.window_size)

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return {"window_size": LogUniform(0.002, 0.5)}


@register_masker(LocalMaskerConfig)
class LocalMasker(Masker[LocalMaskerConfig]):
    """Row i attends to the keys in (i - window_size, i], exactly, however short the text is."""

    keeps_to_allowed = True
    by_position = True

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        sizes = inputs.resolve(self.config.window_size)
        if inputs.shape[2] == 1 and inputs.all_allowed:
            # One row that may see everything: the window is the end of the keys, the same for all heads and items.
            total = inputs.shape[3]
            return mask.union(Mask.from_range(total - sizes[0], total, inputs.shape, inputs.device, inputs.kv_heads))
        limit = torch.tensor(sizes, device=inputs.device).view(-1, 1, 1, 1)
        age = inputs.row_positions[:, None, :, None] - inputs.key_positions[:, None, None, :]
        window_keys = (age < limit) & inputs.allowed
        return mask.union(inputs.mask(window_keys))


if __name__ == "__main__":
    from sparse_attention_hub.maskers.drawing import main

    main("local")
