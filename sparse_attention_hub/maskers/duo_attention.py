"""DuoAttention: retrieval heads see every key, streaming heads what else is chosen (https://arxiv.org/abs/2410.10819).

`python -m sparse_attention_hub.maskers.duo_attention --model M --out F` finds a model's retrieval heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..mask import Mask
from ..search_space import LogUniform
from .base import Masker, MaskerConfig, check_file, check_number, register_masker
from .inputs import AttentionInputs
from .layout import on_device


@dataclass
class DuoAttentionConfig(MaskerConfig):
    """retrieval_share: share in [0, 1] of the model's kv heads that see every key: floored, at least one head unless it is 0.

    pattern_file: see read_pattern; None in a search template: the model's own retrieval heads are then found.
    """

    retrieval_share: float
    pattern_file: str | None = None

    def __post_init__(self) -> None:
        self.retrieval_share = check_number("retrieval_share", self.retrieval_share, 0.0, 1.0)
        self.pattern_file = str(self.pattern_file) if self.pattern_file else None
        if self.pattern_file and not Path(self.pattern_file).is_file():
            raise ValueError(f"pattern_file must be an existing file, got {self.pattern_file!r}")

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return {"retrieval_share": LogUniform(0.01, 0.5)}


@register_masker(DuoAttentionConfig)
class DuoAttention(Masker[DuoAttentionConfig]):
    """The kv heads with the highest values in the pattern file, over all layers, attend to every allowed key. The others attend
    to what other maskers choose: put a sink and a local masker before this one (RazorAttention, https://arxiv.org/abs/2407.15891,
    adds the mean of the dropped keys, which is not done here).

    Density differs between layers: the share holds for the model as a whole. Of equal values the earlier layer's head is taken.
    """

    keeps_to_allowed = True
    in_graphs = True
    varies_by_layer = True

    def __init__(self, config: DuoAttentionConfig) -> None:
        super().__init__(config)
        read_pattern(check_file("pattern_file", config.pattern_file, "head values", "duo_attention"))

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        heads = retrieval_heads(str(self.config.pattern_file), self.config.retrieval_share, inputs.kv_heads)
        if max(inputs.layers) >= len(heads):
            raise ValueError(f"{self.config.pattern_file} is for {len(heads)} layers, this is layer {max(inputs.layers)}")
        own = heads[list(inputs.layers)]
        if not own.any():
            return mask
        flags = on_device(tuple(own.flatten().tolist()), torch.bool, inputs.device).view(*own.shape, 1, 1)
        return mask.union(inputs.mask(flags & inputs.allowed))


def read_pattern(path: str) -> Tensor:
    """How much each head retrieves, float64 (layers, heads), from lines of numbers separated by tabs: a line per layer, a number
    per kv head or per query head. The published full_attention_heads.tsv of DuoAttention are such files. NaN marks a layer that
    attends to a window or not at all; its heads are never retrieval heads. ValueError for other content."""
    return _read(path, Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read(path: str, modified: int) -> Tensor:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        rows = [[float(value) for value in line.split("\t")] for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} must hold numbers separated by tabs, a line per layer: {error}") from None
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"{path} must hold a line of as many numbers for each layer, got {sorted({len(row) for row in rows})}")
    values = torch.tensor(rows, dtype=torch.float64)
    if bool(values.isinf().any()) or bool(values.isnan().all()):
        raise ValueError(f"{path} must hold finite numbers")
    return values


def retrieval_heads(path: str, share: float, kv_heads: int) -> Tensor:
    """Which kv heads see every key: bool (layers, kv_heads). ValueError if the file is for another number of heads."""
    values = read_pattern(path)
    if values.shape[1] % kv_heads:
        raise ValueError(f"{path} has {values.shape[1]} heads per layer, the model {kv_heads} kv heads")
    # A group retrieves if one of its query heads does.
    values = values.unflatten(1, (kv_heads, -1)).nan_to_num(nan=-torch.inf).amax(-1)
    usable = int((values > -torch.inf).sum())
    count = min(usable, max(1, int(share * usable))) if share else 0
    full = torch.zeros(values.numel(), dtype=torch.bool)
    full[values.flatten().argsort(descending=True, stable=True)[:count]] = True
    return full.view(values.shape)


if __name__ == "__main__":
    from sparse_attention_hub.models.head_calibration import main

    raise SystemExit(main())
