"""Loki: the keys with the highest scores over the first principal components of keys (https://arxiv.org/abs/2406.02542).

`python -m sparse_attention_hub.maskers.loki --model M --out F` finds the principal axes of a model's keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import dot_all
from ..lists import expand_heads
from ..mask import Mask
from ..search_space import Choice
from .base import Masker, TopKConfig, check_file, check_size, register_masker
from .codes import kept_channels
from .inputs import AttentionInputs
from .principal_axes import read_axes


@dataclass
class LokiConfig(TopKConfig):
    """heavy_size: see TopKConfig. axes_file: see principal_axes.py; None in a search template: the search
    then calibrates the model. components: of each key that are kept, int or float (fraction of the head dimension)."""

    axes_file: str | None
    components: int | float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self.components = check_size("components", self.components)
        self.axes_file = str(self.axes_file) if self.axes_file else None
        if self.axes_file and not Path(self.axes_file).is_file():
            raise ValueError(f"axes_file must be an existing file, got {self.axes_file!r}")

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        return super().get_search_space(task_name) | {"components": Choice([0.0625, 0.125, 0.25, 0.5])}


@register_masker(LokiConfig)
class LokiMasker(Masker[LokiConfig]):
    """Per query head and row, the `heavy_size` residual keys with the highest q.k over the first principal components of the kv
    head's keys, of this layer, after RoPE.

    The state keeps the first components of each key, in the keys' type. (The paper keeps the keys themselves in this basis.)
    """

    keeps_to_allowed = True
    in_graphs = True
    code_fields = ("axes_file", "components")

    def __init__(self, config: LokiConfig) -> None:
        super().__init__(config)
        read_axes(check_file("axes_file", config.axes_file, "principal axes", "loki"))
        self._ready: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        scores = self.shared(inputs, lambda: self._scores(inputs))
        return mask.union(inputs.choose_top(scores, mask, self.config.heavy_size))

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        dim = inputs.keys.shape[3]
        return kept_channels(self.config.components, dim) / (2 * dim)

    def encode(self, keys: Tensor, fitted: Any, layer_idx: int) -> Tensor:
        """First components of keys (B, Hkv, n, D): (B, Hkv, n, c)."""
        return self._project(keys, (layer_idx,), keys.shape[1]).to(keys.dtype)

    def _project(self, vectors: Tensor, layers: tuple[int, ...], kv_heads: int) -> Tensor:
        """First components of queries or keys (B, h, n, D): (B, h, n, c), float32 or wider."""
        wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        axes = self._axes(layers, kv_heads, vectors.shape[3], vectors.device).to(wide.dtype)
        return wide @ expand_heads(axes, vectors.shape[1])

    def _axes(self, layers: tuple[int, ...], kv_heads: int, dim: int, device: torch.device) -> Tensor:
        """The kept axes of the layers, float32 (layers, kv_heads or 1, D, c). ValueError if the file's do not fit."""
        place = layers, device
        if place not in self._ready:
            file, found = self.config.axes_file, []
            for layer_idx in layers:
                axes = read_axes(str(file)).get(layer_idx)
                if axes is None:
                    raise ValueError(f"{file} has no principal axes of layer {layer_idx}")
                if axes.shape[0] not in (1, kv_heads) or axes.shape[1:] != (dim, dim):
                    got = tuple(axes.shape)
                    raise ValueError(f"axes in {file} are {got}, the model has {kv_heads} kv heads of {dim} channels")
                found.append(axes[:, :, : kept_channels(self.config.components, dim)])
            self._ready[place] = torch.stack(found).to(device, torch.float32)
        return self._ready[place]

    def _scores(self, inputs: AttentionInputs) -> Tensor:
        """Approximate scores (B, H, Q, N), with the attention mask's bias."""
        _, codes = self.codes(inputs)
        queries = self._project(inputs.queries, inputs.layers, inputs.kv_heads)
        return inputs.layout.biased(dot_all(queries, codes, inputs.scaling))


if __name__ == "__main__":
    from sparse_attention_hub.models.axes_calibration import main

    raise SystemExit(main())
