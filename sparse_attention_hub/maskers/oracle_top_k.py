"""Oracle top-k: the keys with the highest true scores. The quality that score-based selectors try to reach."""

from dataclasses import dataclass

from ..mask import Mask
from .base import Masker, TopKConfig, draw_example, register_masker
from .inputs import AttentionInputs


@dataclass
class OracleTopKConfig(TopKConfig):
    """heavy_size: see TopKConfig."""


@register_masker(OracleTopKConfig)
class OracleTopK(Masker[OracleTopKConfig]):
    """Per query head and row, the `heavy_size` residual keys with the highest q.k. Reads every key."""

    keeps_to_allowed = True
    in_graphs = True
    score_bytes = (24, 6)

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        return mask.union(inputs.choose_top(inputs.scores(), mask, self.config.heavy_size))

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        return 0.5


if __name__ == "__main__":
    draw_example("oracle_top_k")
