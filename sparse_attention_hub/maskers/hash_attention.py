"""HashAttention: the keys whose learned bit signature is nearest to the query's (https://arxiv.org/abs/2412.14468).

`python -m sparse_attention_hub.maskers.hash_attention train --model M --out F` learns the signatures of a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mask import Mask
from .base import Masker, TopKConfig, check_int, register_masker
from .codes import pack_bits, score_bits
from .hat_weights import Layer, check_weights, read_hat_weights, ready_layer, stack_layers
from .inputs import AttentionInputs
from .layout import NEVER

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh}
# Keys whose networks run at once.
CHUNK = 4096
_NUMBERS = itertools.count()


@dataclass
class HashAttentionTopKMaskerConfig(TopKConfig):
    """heavy_size: see TopKConfig. hat_bits: bits of a signature. hat_mlp_layers, hat_mlp_hidden_size,
    hat_mlp_activation (relu, silu, gelu, tanh): the networks that make signatures. hat_weights: their weights,
    {layer: {part: [tensor of each network layer]}}, or hat_weight_file: the same in safetensors, see
    hat_weights.py for both. A search template may leave both out.
    """

    hat_bits: int
    hat_mlp_layers: int
    hat_mlp_hidden_size: int
    hat_mlp_activation: str
    hat_weights: dict[int, Layer] | None = None
    hat_weight_file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hat_bits = check_int("hat_bits", self.hat_bits, 1)
        self.hat_mlp_layers = check_int("hat_mlp_layers", self.hat_mlp_layers, 1)
        least = 0 if self.hat_mlp_layers == 1 else 1
        self.hat_mlp_hidden_size = check_int("hat_mlp_hidden_size", self.hat_mlp_hidden_size, least)
        self.hat_weight_file = str(self.hat_weight_file) if self.hat_weight_file else None
        if self.hat_mlp_activation not in ACTIVATIONS:
            raise ValueError(f"hat_mlp_activation must be one of {', '.join(ACTIVATIONS)}, got {self.hat_mlp_activation!r}")


@register_masker(HashAttentionTopKMaskerConfig)
class HashAttentionTopKMasker(Masker[HashAttentionTopKMaskerConfig]):
    """Per query head and row, the `heavy_size` residual keys whose signatures share the most bits with the query's;
    of equals the most recent. A signature is the signs of a small network's outputs, packed into 32-bit words: one
    per kv head where its query heads share the key network.
    """

    keeps_to_allowed = True
    in_graphs = True

    def __init__(self, config: HashAttentionTopKMaskerConfig) -> None:
        super().__init__(config)
        if (config.hat_weights is None) == (config.hat_weight_file is None):
            got = "neither" if config.hat_weights is None else "both"
            raise ValueError(f"exactly one of hat_weights and hat_weight_file must be given, got {got}")
        file = config.hat_weight_file
        self._weights: dict[int, Layer] = read_hat_weights(file) if file is not None else config.hat_weights or {}
        check_weights(self._weights, config.hat_bits, config.hat_mlp_layers, config.hat_mlp_hidden_size)
        # Weights given in memory have no name: their codes are this masker's own.
        self._source = config.hat_weight_file or f"masker {next(_NUMBERS)}"
        self._ready: dict[tuple[int, int, str], Layer] = {}

    def select(self, inputs: AttentionInputs, mask: Mask) -> Mask:
        scores = self.shared(inputs, lambda: self._scores(inputs))
        return mask.union(inputs.choose_top(scores, mask, self.config.heavy_size))

    def codes_key(self) -> tuple[str, ...]:
        return type(self).__name__, self._source, self.config.hat_mlp_activation

    def encode(self, keys: Tensor, fitted: Any, layer_idx: int) -> Tensor:
        """Signatures of keys (B, Hkv, n, D): int32 (B, Hkv, n, networks, words), one network per kv head or per query head."""
        layer = self._layer(layer_idx, keys)
        parts = [self._signatures(part.unsqueeze(2), layer, "key") for part in torch.split(keys, CHUNK, 2)]
        return torch.cat(parts, 3).transpose(2, 3)

    def selector_fraction(self, inputs: AttentionInputs) -> float:
        networks = self._layer(inputs.layers[0], inputs.keys)["key_matrix"][0].shape[1]
        return networks * self.config.hat_bits / (16 * inputs.keys.element_size() * inputs.keys.shape[3])

    def _layer(self, layer_idx: int, keys: Tensor) -> Layer:
        place = (layer_idx, keys.shape[1], str(keys.device))
        if place not in self._ready:
            if layer_idx not in self._weights:
                raise ValueError(f"the hash weights have no layer {layer_idx}, only {sorted(self._weights)}")
            self._ready[place] = ready_layer(self._weights[layer_idx], keys)
        return self._ready[place]

    def _signatures(self, x: Tensor, layer: Layer, side: str) -> Tensor:
        """x (B, Hkv, networks, n, D), or 1 for networks that read the same x, to packed signs (B, Hkv, networks, n, words)."""
        x = x.float()
        for depth, (matrix, bias) in enumerate(zip(layer[f"{side}_matrix"], layer[f"{side}_bias"], strict=True)):
            x = ACTIVATIONS[self.config.hat_mlp_activation](x) if depth else x
            x = x @ matrix + bias.unsqueeze(-2)
        return pack_bits(x > 0)

    def _scores(self, inputs: AttentionInputs) -> Tensor:
        """Minus the number of bits that differ: float32 (B, H, Q, N), -inf where not allowed."""
        batch, heads, rows, _ = inputs.shape
        _, codes = self.codes(inputs)
        each = [self._layer(layer_idx, inputs.keys) for layer_idx in inputs.layers]
        layer = each[0] if len(each) == 1 else stack_layers(each)
        networks = layer["query_matrix"][0].shape[-4:-2].numel()
        if networks != heads:
            raise ValueError(f"the hash weights are for {networks} query heads, the model has {heads}")
        grouped = inputs.queries.reshape(batch, inputs.kv_heads, -1, rows, inputs.queries.shape[-1])
        scores = score_bits(self._signatures(grouped, layer, "query"), codes).reshape(inputs.shape)
        return scores if inputs.layout.all_allowed else scores.masked_fill_(~inputs.allowed, NEVER)


if __name__ == "__main__":
    from sparse_attention_hub.models.hat_training import main

    raise SystemExit(main())
