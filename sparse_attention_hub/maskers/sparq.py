"""SparQ: the keys with the highest scores over the channels in which the query is largest (https://arxiv.org/abs/2312.04985)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..mask import Mask
from ..search_space import Choice
from .base import Masker, TopKConfig, check_size, draw_example, register_masker
from .codes import group_shares, kept_channels, score_channels
from .inputs import AttentionInputs

#: Keeps a query of zeros from dividing by zero.
TINY = 1e-30


@dataclass
class SparqConfig(TopKConfig):
    """heavy_size: see TopKConfig. channels: r of the paper, channels of a key that are read to score it, int or float (fraction
    of the head dimension); more than there are means all."""

    channels: int | float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self.channels = check_size("channels", self.channels)

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return super().get_search_space(task_name) | {"channels": Choice([0.0625, 0.125, 0.25, 0.5])}


@register_masker(SparqConfig)
class SparqMasker(Masker[SparqConfig]):
    """The channels of largest |q|, summed over the query heads of a kv head, estimate each head's attention: the scores over them,
    divided by the square root of their share of |q|, in a softmax. The heads attend to the same keys, the `heavy_size`
    residual ones with the highest estimates, summed over the heads.

    There is no state: the keys themselves are read, r of D channels to choose, then the chosen ones whole. The paper's last step,
    which adds the mean value for the keys left out, is not a choice of keys, and is left out here.
    """

    keeps_to_allowed = True
    in_graphs = True
    code_fields = ("channels",)

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        shares = self.shared(inputs, lambda: self._shares(inputs))
        return mask.union(inputs.choose_top(shares, mask, self.config.heavy_size))

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        dim = inputs.keys.shape[3]
        return kept_channels(self.config.channels, dim) / (2 * dim)

    def _shares(self, inputs: AttentionInputs) -> Tensor:
        """Estimated attention, summed over the query heads of each kv head: (B, Hkv, Q, N), -inf where not allowed."""
        queries = inputs.queries.to(torch.promote_types(inputs.queries.dtype, torch.float32))
        sizes = queries.abs().unflatten(1, (inputs.kv_heads, -1))
        channels = sizes.sum(2).topk(kept_channels(self.config.channels, queries.shape[3]), -1).indices  # (B, Hkv, Q, r)
        kept = sizes.gather(-1, channels.unsqueeze(2).expand(-1, -1, inputs.group_size, -1, -1))
        covered = (kept.sum(-1) / sizes.sum(-1).clamp(min=TINY)).clamp(min=TINY).flatten(1, 2).unsqueeze(-1)
        scores = score_channels(queries * inputs.scaling / covered.sqrt(), inputs.keys, channels)
        return group_shares(inputs.layout.biased(scores), inputs.kv_heads)


if __name__ == "__main__":
    draw_example("sparq")
