"""Twilight: of a selector's candidates, the fewest keys whose estimated mass reaches p (https://arxiv.org/abs/2502.02770)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import dot
from ..lists import expand_heads
from ..mask import Mask
from ..search_space import Choice
from .base import Masker, MaskerConfig, check_int, check_number, draw_example, register_masker
from .codes import pseudo_quantise
from .inputs import AttentionInputs


@dataclass
class TwilightConfig(MaskerConfig):
    """top_p: share in (0, 1] of the candidates' estimated attention mass. label_bits: bits of each key channel in the estimate,
    1 to 16; 16 = as the keys are."""

    top_p: float
    label_bits: int = 4

    def __post_init__(self) -> None:
        self.top_p = check_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        self.label_bits = check_int("label_bits", self.label_bits, 1, 16)

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return {"top_p": Choice([0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999])}


@register_masker(TwilightConfig)
class Twilight(Masker[TwilightConfig]):
    """Narrows what the selectors before it chose; without a selector its candidates are all allowed keys. Per query head and row,
    the attention weights of the candidates are estimated from keys that are rounded to few bits, each between its smallest and
    its largest channel. The fewest candidates whose weights add up to `top_p` stay; those that tie with the last one stay too.

    Keys that were chosen by their position before the selector (sinks, a local window) always stay. Their weights are part of
    the mass, as in the paper, whose selectors choose such keys too: a head that attends to little else keeps few others.
    Dropped keys are residual again: a sampler behind it may draw them. top_p = 1 drops nothing.
    The state holds the rounded keys, in the keys' own type; a kernel would hold `label_bits` per channel.
    """

    narrows = True
    keeps_to_allowed = True
    in_graphs = True
    code_fields = ("label_bits",)
    score_bytes = (96, 96)

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        lists = mask.lists()
        if self.config.top_p >= 1.0 or lists.indices.shape[-1] == 0:
            return mask
        indices = expand_heads(lists.indices, inputs.shape[1])
        places = indices.clamp(min=0).long()
        weights = self._scores(inputs, mask, places).softmax(-1).nan_to_num(0.0)  # a row without candidates has no mass
        stays = torch.zeros_like(indices, dtype=torch.bool)
        if inputs.kept is not None:
            stays = expand_heads(inputs.kept.chosen(), inputs.shape[1]).gather(-1, places) & (indices >= 0)
        needed = self.config.top_p - (weights * stays).sum(-1, keepdim=True)
        others = weights.masked_fill(stays, 0.0)
        falling = others.sort(-1, descending=True).values
        above = falling.cumsum(-1) - falling
        least = falling.masked_fill(above >= needed, torch.inf).amin(-1, keepdim=True)
        return mask.narrow(stays | ((others >= least) & (others > 0)))

    def encode(self, keys: Tensor, fitted: Any, layer_idx: int) -> Tensor:
        """Rounded keys (B, Hkv, n, D)."""
        return pseudo_quantise(keys, self.config.label_bits).to(keys.dtype)

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        width = 8 * inputs.keys.element_size()
        return min(self.config.label_bits if self.config.label_bits < 16 else width, width) / width / 2

    def _scores(self, inputs: AttentionInputs, mask: Mask, places: Tensor) -> Tensor:
        """Estimated logits of the mask's keys, in the order of its lists: float64 (B, H, Q, K), -inf on padding."""
        _, keys = self.codes(inputs)
        scores = dot(inputs.queries, keys, mask, inputs.scaling, inputs.softcap)
        if inputs.layout.bias is not None:
            scores = scores + inputs.layout.bias.expand(inputs.shape).gather(-1, places)
        return scores.double()


if __name__ == "__main__":
    draw_example("twilight")
