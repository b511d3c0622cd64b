"""Oracle top-p: the fewest keys that hold a share of the attention mass (as in Twilight, https://arxiv.org/abs/2502.02770)."""

from dataclasses import dataclass
from typing import Any

from ..mask import Mask
from ..search_space import Uniform
from .base import Masker, MaskerConfig, check_number, draw_example, register_masker
from .inputs import AttentionInputs


@dataclass
class OracleTopPMaskerConfig(MaskerConfig):
    """top_p: share in [0, 1] of the attention mass that earlier maskers left over."""

    top_p: float

    def __post_init__(self) -> None:
        self.top_p = check_number("top_p", self.top_p, 0.0, 1.0)

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return {"top_p": Uniform(0.05, 0.99)}


@register_masker(OracleTopPMaskerConfig)
class OracleTopP(Masker[OracleTopPMaskerConfig]):
    """Per query head and row: the shortest prefix of the residual keys, by falling score, whose mass exceeds `top_p`.

    Keys that tie with the last one are chosen too; top_p = 0 chooses the highest key, top_p = 1 all. Reads every key.
    """

    keeps_to_allowed = True
    in_graphs = True
    score_bytes = (38, 16)

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        if self.config.top_p >= 1.0:
            return mask.union(inputs.layout.everything())
        return mask.union(inputs.choose_mass(mask, self.config.top_p))

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        return 0.5


if __name__ == "__main__":
    draw_example("oracle_top_p")
