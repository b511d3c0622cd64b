"""Random sampling: some of what is left, all alike. The unbiased baseline of every sampler."""

from dataclasses import dataclass
from typing import Any

from ..mask import Mask
from ..search_space import LogUniform
from .base import Masker, MaskerConfig, check_number, draw_example, register_masker
from .inputs import AttentionInputs


@dataclass
class RandomSamplingMaskerConfig(MaskerConfig):
    """sampling_rate: keys to draw as a fraction of N, in (0, 1]."""

    sampling_rate: float

    def __post_init__(self) -> None:
        self.sampling_rate = check_number("sampling_rate", self.sampling_rate, 0.0, 1.0, open_low=True)

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return {"sampling_rate": LogUniform(0.005, 0.5)}


@register_masker(RandomSamplingMaskerConfig)
class RandomSamplingMasker(Masker[RandomSamplingMaskerConfig]):
    """Draws m = min(R, max(1, floor(rate * N))) of the R residual keys of a row without replacement: p = m / R.

    The estimate of the softmax denominator over the residual is unbiased, and exact at m = R. The query heads of a group
    share the order of keys they draw in.
    """

    is_sampling = True
    keeps_to_allowed = True
    in_graphs = True
    score_bytes = (20, 4)

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        return mask.union(inputs.draw(mask, self.config.sampling_rate))


if __name__ == "__main__":
    draw_example("random_sampling")
