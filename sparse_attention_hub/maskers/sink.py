"""Sink: the first allowed keys (StreamingLLM, https://arxiv.org/abs/2309.17453)."""

from dataclasses import dataclass
from typing import Any

from ..mask import Mask
from ..search_space import Choice
from .base import Masker, MaskerConfig, check_size, draw_example, register_masker
from .inputs import AttentionInputs


@dataclass
class SinkMaskerConfig(MaskerConfig):
    """sink_size: the first allowed keys, int (tokens) or float (fraction of N)."""

    sink_size: int | float

    def __post_init__(self) -> None:
        self.sink_size = check_size("sink_size", self.sink_size)

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return {"sink_size": Choice([0.001, 0.005, 0.01, 0.02, 0.05])}


@register_masker(SinkMaskerConfig)
class SinkMasker(Masker[SinkMaskerConfig]):
    """Attends to the first `sink_size` allowed keys of every item, as far as causality lets a row see them."""

    keeps_to_allowed = True
    in_graphs = True
    score_bytes = (3, 2)
    by_position = True

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        return mask.union(inputs.layout.first_keys(*inputs.bounded(self.config.sink_size)))


if __name__ == "__main__":
    draw_example("sink")
