"""Local: a window of the most recent keys (Longformer, https://arxiv.org/abs/2004.05150; StreamingLLM's recent keys)."""

from dataclasses import dataclass
from typing import Any

from ..mask import Mask
from ..search_space import LogUniform
from .base import Masker, MaskerConfig, check_size, draw_example, register_masker
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
    in_graphs = True
    score_bytes = (3, 2)
    by_position = True

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        return mask.union(inputs.layout.last_keys(*inputs.bounded(self.config.window_size)))


if __name__ == "__main__":
    draw_example("local")
