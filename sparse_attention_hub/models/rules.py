"""What a layer asks of its attention beyond the softmax of scaled products: windows, chunks, softcap, sinks."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..errors import UserError
from .config_checks import max_positions

_CHANGED = "changes its attention scores in a way that is not supported ({}): take another model"
_OWN_MASK = "makes its own attention mask in its layers, which is not supported: take another model"


class Rule(NamedTuple):
    """window: keys that a query attends to, its own included. chunk: a query attends to keys of its own chunk of so many
    positions. softcap: logits become softcap * tanh(logit / softcap). sinks (H,): a logit per head in the denominator.
    latent: numbers per token of the one latent that all heads' keys and values are made of, 0 = none."""

    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    latent: int = 0

    @property
    def limited(self) -> bool:
        """Whether the layer sees a part of the keys only. Such layers stay dense."""
        return self.window is not None or self.chunk is not None

    @property
    def scores(self) -> dict[str, Any]:
        """softcap and sinks as keyword arguments, those that the layer has."""
        given = {"softcap": self.softcap, "sinks": self.sinks}
        return {name: value for name, value in given.items() if value is not None}

    def first_key(self, position: Any) -> Any:
        """The first key that a query at a position (an int or a tensor of them) attends to."""
        if self.window is not None:
            return position - self.window + 1
        return position - position % self.chunk if self.chunk is not None else position * 0


PLAIN = Rule()


def layer_rule(module: Any, kwargs: dict[str, Any]) -> Rule:
    """The rule of a layer's call. UserError if the layer asks for something that is not supported."""
    for name in ("position_bias", "indices"):
        if kwargs.get(name) is not None:
            raise UserError(f"this model {_CHANGED.format(name)}")
    config = getattr(module, "config", None)
    kinds: list[str] | None = getattr(config, "layer_types", None)
    chunked = kinds is not None and kinds[module.layer_idx] == "chunked_attention"
    has_latent = hasattr(module, "kv_b_proj")
    return Rule(
        window=_binding(kwargs.get("sliding_window"), config),
        chunk=_binding(getattr(config, "attention_chunk_size", None), config) if chunked else None,
        softcap=kwargs.get("softcap") or None,
        sinks=kwargs.get("s_aux"),
        latent=module.kv_lora_rank + module.qk_rope_head_dim if has_latent else 0,
    )


def _binding(size: int | None, config: Any) -> int | None:
    """A window or chunk, None where no text is longer: Phi-3's configuration has a window as long as its positions."""
    longest = None if size is None or config is None else max_positions(config)
    return None if size is None or (longest is not None and size >= longest) else size


def refuse_mask(mask: Tensor | None) -> None:
    """UserError for a mask that reaches a layer though none was made: the layer made it, from what it has not said."""
    if mask is not None:
        raise UserError(f"this model {_OWN_MASK}")
