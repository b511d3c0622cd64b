"""Causal: every key that the causal and padding masks allow."""

from dataclasses import dataclass

from ..mask import Mask
from .base import Masker, MaskerConfig, draw_example, register_masker
from .inputs import AttentionInputs


@dataclass
class CausalMaskerConfig(MaskerConfig):
    """No fields: causality itself is always kept, this only says that nothing more is left out."""


@register_masker(CausalMaskerConfig)
class CausalMasker(Masker[CausalMaskerConfig]):
    """Alone it is dense attention; behind other maskers it changes nothing."""

    keeps_to_allowed = True
    in_graphs = True
    by_position = True

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        return inputs.layout.everything() if mask.is_empty else mask


if __name__ == "__main__":
    draw_example("causal")
