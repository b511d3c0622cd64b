"""Oracle top-k: the keys with the highest true scores. The quality that score-based selectors try to reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..mask import Mask
from ..search_space import LogUniform
from .base import Masker, MaskerConfig, check_size, register_masker
from .inputs import AttentionInputs


@dataclass
class OracleTopKConfig(MaskerConfig):
    """heavy_size: keys chosen beside those already chosen, int (tokens) or float (fraction of N)."""

    heavy_size: int | float

    def __post_init__(self) -> None:
        self.heavy_size = check_size("heavy_size", self.heavy_size)

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return {"heavy_size": LogUniform(0.005, 0.5)}


@register_masker(OracleTopKConfig)
class OracleTopK(Masker[OracleTopKConfig]):
    """Per query head and row, the `heavy_size` residual keys with the highest q.k. Reads every key."""

    keeps_to_allowed = True

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        return mask.union(inputs.choose_top(inputs.scores(), mask, self.config.heavy_size))

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        return 0.5


if __name__ == "__main__":
    from sparse_attention_hub.maskers.drawing import main

    main("oracle_top_k")
