"""Double Sparsity: the keys with the highest scores over a few important channels (https://arxiv.org/abs/2408.07092).

`python -m sparse_attention_hub.maskers.double_sparsity --model M --out F` finds a model's important channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import dot_all
from ..mask import Mask
from ..search_space import Choice
from .base import Masker, TopKConfig, check_file, check_int, register_masker
from .channel_file import layer_channels, read_channels
from .codes import pack_levels, packs, pseudo_quantise, unpack_levels
from .inputs import AttentionInputs

CHANNEL_SELECTIONS = ("q_proj", "k_proj", "qk_proj")


@dataclass
class DoubleSparsityTopKMaskerConfig(TopKConfig):
    """heavy_size: see TopKConfig. sorted_channel_file: see channel_file.py; None in a search template: the
    search then calibrates the model.
    group_factor: head_dim / channels kept. label_bits: bits of each kept channel, 1 to 16; 16 = as queries and keys are.
    channel_selection: q_proj, k_proj or qk_proj, the list of the file to use.
    """

    sorted_channel_file: str | None
    group_factor: int = 16
    label_bits: int = 4
    channel_selection: str = "qk_proj"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.group_factor = check_int("group_factor", self.group_factor, 1)
        self.label_bits = check_int("label_bits", self.label_bits, 1, 16)
        self.sorted_channel_file = str(self.sorted_channel_file) if self.sorted_channel_file else None
        if self.sorted_channel_file and not Path(self.sorted_channel_file).is_file():
            raise ValueError(f"sorted_channel_file must be an existing file, got {self.sorted_channel_file!r}")
        if self.channel_selection not in CHANNEL_SELECTIONS:
            known = ", ".join(CHANNEL_SELECTIONS)
            raise ValueError(f"channel_selection must be one of {known}, got {self.channel_selection!r}")

    @classmethod
    def get_search_space(cls, task_name: str) -> dict[str, Any]:
        codes = {"group_factor": Choice([4, 8, 16]), "label_bits": Choice([2, 4, 8, 16])}
        return super().get_search_space(task_name) | codes


@register_masker(DoubleSparsityTopKMaskerConfig)
class DoubleSparsityTopKMasker(Masker[DoubleSparsityTopKMaskerConfig]):
    """Per query head and row, the `heavy_size` residual keys with the highest q.k over the head's channels of this layer.

    The kept channels of a key (its label), rounded to few bits, are cached; each query head has its own channels.
    """

    keeps_to_allowed = True
    in_graphs = True
    code_fields = ("sorted_channel_file", "group_factor", "label_bits", "channel_selection")

    def __init__(self, config: DoubleSparsityTopKMaskerConfig) -> None:
        super().__init__(config)
        read_channels(check_file("sorted_channel_file", config.sorted_channel_file, "channels", "double_sparsity"))
        self._channels: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        scores = self.shared(inputs, lambda: self._scores(inputs))
        return mask.union(inputs.choose_top(scores, mask, self.config.heavy_size))

    def encode(self, keys: Tensor, fitted: Any, layer_idx: int) -> Tensor:
        """Labels of keys (B, Hkv, n, D): (B, Hkv, n, g * c), c channels for each of the g query heads of a kv head, or packed."""
        batch, kv_heads, length, dim = keys.shape
        channels = self.channels((layer_idx,), dim, keys.device)
        if channels.shape[1] % kv_heads:
            raise ValueError(f"the channel file has {channels.shape[1]} heads, which {kv_heads} kv heads do not divide")
        index = channels.view(1, kv_heads, 1, -1).expand(batch, -1, length, -1)
        labels = keys.gather(-1, index).view(batch, kv_heads, length, -1, channels.shape[2])
        if packs(keys, self.config.label_bits):
            return pack_levels(labels, self.config.label_bits)
        return pseudo_quantise(labels, self.config.label_bits).flatten(3)

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        width = 8 * inputs.keys.element_size()
        bits = self.config.label_bits if self.config.label_bits < 16 else width
        kept = inputs.group_size * (inputs.keys.shape[3] // self.config.group_factor)
        return kept * min(bits, width) / (2 * width * inputs.keys.shape[3])

    def channels(self, layers: tuple[int, ...], dim: int, device: torch.device) -> Tensor:
        """The kept channels of the layers' query heads, int64 (layers, H, c), c = dim // group_factor."""
        place = layers, device
        if place not in self._channels:
            kept = dim // self.config.group_factor
            if kept == 0:
                raise ValueError(f"group_factor must be at most the head dimension {dim}, got {self.config.group_factor}")
            path, selection = str(self.config.sorted_channel_file), self.config.channel_selection
            found = torch.stack([layer_channels(path, layer_idx, selection, kept, dim) for layer_idx in layers])
            self._channels[place] = found.to(device, non_blocking=True)
        return self._channels[place]

    def _scores(self, inputs: AttentionInputs) -> Tensor:
        """Approximate logits, float32 (B, H, Q, N)."""
        batch, heads, rows, _ = inputs.shape
        _, labels = self.codes(inputs)
        channels = self.channels(inputs.layers, inputs.queries.shape[-1], inputs.device)
        if channels.shape[1] != heads:
            raise ValueError(f"{self.config.sorted_channel_file} is for {channels.shape[1]} query heads, the model has {heads}")
        kept, group = channels.shape[2], inputs.group_size
        if packs(inputs.keys, self.config.label_bits):
            labels = unpack_levels(labels, group, kept, self.config.label_bits).flatten(3)
        index = channels.view(-1, heads, 1, kept).expand(batch, -1, rows, -1)
        own = pseudo_quantise(inputs.queries.gather(-1, index), self.config.label_bits)
        # Each head's channels stand in a block of their own, zeros in its neighbours': one matrix product scores the group.
        spread = own.new_zeros((batch, heads // group, group, rows, group, kept))
        spread.diagonal(dim1=2, dim2=4).copy_(own.view(batch, heads // group, group, rows, kept).permute(0, 1, 3, 4, 2))
        return inputs.layout.biased(dot_all(spread.view(batch, heads, rows, group * kept), labels, kept**-0.5))


if __name__ == "__main__":
    from sparse_attention_hub.models.channel_calibration import main

    raise SystemExit(main())
