"""Queries without their rotary embedding, and the mean rotation of positions to come.

Models rotate in several ways: halves or neighbouring channels, some of the channels, some of the layers. Their own function is
used, with the sine's sign changed to undo it, and is checked once on equal tokens: their queries differ by their rotation alone.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import UserError
from .switch import SessionAttention, attention_configs, attention_modules

#: Positions over which the rotation to come is averaged, as in Expected Attention.
FUTURE = 512
_TOKENS = 6
#: Of the queries' norm: equal tokens may differ by rounding.
_TOLERANCE = 0.05


class Rotation:
    """The rotary embedding of a model's layers. rotated: the first channels of a query that are rotated, by layer; 0 = none."""

    def __init__(self, model: Any) -> None:
        """UserError if the queries of a layer cannot be reproduced from its rotary embedding."""
        self._model = model
        self._modules = {module.layer_idx: module for module in attention_modules(model)}
        if model not in _KNOWN:
            _KNOWN[model] = self._check()
        self.rotated = _KNOWN[model]

    def undo(self, queries: Tensor, layer_idx: int, first: int) -> Tensor:
        """Queries (B, H, Q, D) at positions from `first` on, without their rotary embedding: float32."""
        if not self.rotated[layer_idx]:
            return queries.float()
        cos, sin = self._factors(layer_idx, torch.arange(first, first + queries.shape[2], device=queries.device))
        size = cos.square() + sin.square()  # above 1 where the embedding scales too
        return self._rotate(layer_idx, queries.float(), cos / size, -sin / size)

    def to_come(self, layer_idx: int, first: int, like: Tensor) -> Tensor | None:
        """The mean rotation of FUTURE positions from `first` on, for queries as `like`: (D, D); None without an embedding."""
        if not self.rotated[layer_idx]:
            return None
        cos, sin = self._factors(layer_idx, torch.arange(first, first + FUTURE, device=like.device))
        channels = torch.eye(like.shape[-1], device=like.device)[None, :, None]  # a head for each channel, at one position
        return self._rotate(layer_idx, channels, cos.mean(1, keepdim=True), sin.mean(1, keepdim=True))[0, :, 0].T

    def _factors(self, layer_idx: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions (n,): each float32 (1, n, d)."""
        module = self._modules[layer_idx]
        embedding = getattr(module, "rotary_emb", None) or _embedding(self._model)
        kind = {}
        if "layer_type" in inspect.signature(embedding.forward).parameters:
            kind["layer_type"] = module.config.layer_types[layer_idx]
        like = torch.empty(1, device=positions.device)
        cos, sin = embedding(like, positions[None], **kind)
        return cos.float(), sin.float()

    def _rotate(self, layer_idx: int, queries: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """By the model's own function."""
        function = sys.modules[type(self._modules[layer_idx]).__module__].apply_rotary_pos_emb
        width = self.rotated[layer_idx]
        turned = function(queries[..., :width], queries[..., :width], cos, sin)[0]
        return torch.cat([turned, queries[..., width:]], -1)

    def _check(self) -> dict[int, int]:
        probe = _Probe()
        weight = self._model.get_input_embeddings().weight
        ids = weight[:100].norm(dim=-1).argmax().expand(1, _TOKENS)  # not one whose embedding is 0, as that of padding often is
        with _ATTENTION.used_by(probe, attention_configs(self._model)), torch.no_grad():
            self._model.base_model(input_ids=ids, use_cache=False)
        return {layer_idx: self._rotated_channels(layer_idx, queries) for layer_idx, queries in probe.queries.items()}

    def _rotated_channels(self, layer_idx: int, queries: Tensor) -> int:
        """queries: of equal tokens at positions 0, 1, ..."""
        if _alike(queries):
            return 0
        try:
            factors = self._factors(layer_idx, torch.arange(queries.shape[2], device=queries.device))[0].shape[-1]
            for width in (factors, 2 * factors):  # a factor for each channel, or for each pair of them
                self.rotated = {layer_idx: width}
                if width <= queries.shape[-1] and _alike(self.undo(queries, layer_idx, 0)):
                    return width
        except (AttributeError, TypeError, ValueError, RuntimeError):  # another function, or none
            pass
        raise UserError(
            f"Expected Attention needs queries without their rotary embedding, and that of layer {layer_idx} of this model "
            f"({self._model.config.model_type}) cannot be undone: leave ExpectedAttentionConfig out"
        )


class _Probe:
    """Attention that returns each row's own value: over equal tokens, the rows of a layer have one query but for its rotation."""

    def __init__(self) -> None:
        self.queries: dict[int, Tensor] = {}

    def attend(self, module: Any, queries: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
        self.queries[module.layer_idx] = queries
        return values.repeat_interleave(queries.shape[1] // values.shape[1], 1).transpose(1, 2).contiguous()


def _alike(queries: Tensor) -> bool:
    """Whether the queries (1, H, Q, D) of all rows are the same."""
    first = queries[:, :, :1].float()
    return bool((queries.float() - first).norm() < _TOLERANCE * first.expand_as(queries).norm())


def _embedding(model: Any) -> Any:
    """The text decoder's module of rotary factors."""
    config = model.config.get_text_config(decoder=True)
    found = [module for name, module in model.named_modules() if name.endswith("rotary_emb")]
    return next((module for module in found if getattr(module, "config", None) is config), found[0] if found else None)


_ATTENTION = SessionAttention("sparse_hub_rotation", "inside Rotation only", make_mask=lambda *_, **__: None)
#: `Rotation.rotated`, by model.
_KNOWN: WeakKeyDictionary[Any, dict[int, int]] = WeakKeyDictionary()
