"""Switching a loaded model between attention implementations, without reloading it.

A model looks its attention function up by its config's name at every layer of every forward pass. Switching is one
attribute write for each config object involved: process-wide for that model, so not for two threads at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UserError


def attention_configs(model: Any) -> list[Any]:
    """The config objects that decide the text decoder's attention and its masks; never those of a vision tower."""
    found: dict[int, Any] = {id(model.config): model.config}
    text_config = model.config.get_text_config(decoder=True)
    found[id(text_config)] = text_config
    for module in attention_modules(model):
        found.setdefault(id(module.config), module.config)
    return list(found.values())


def attention_modules(model: Any) -> list[Any]:
    """The decoder's attention layers: modules that know their layer and project queries or keys."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "config")
        and any(hasattr(module, name) for name in ("q_proj", "k_proj", "qkv_proj", "query_key_value", "c_attn", "W_pack"))
    ]


def check_supported(model: Any, name: str) -> None:
    """UserError for models whose attention this library would get wrong."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attn_logit_softcapping", None):
        raise UserError(
            f"model {name!r} soft-caps attention scores, which sparse attention here does not do: take another model"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise UserError(f"model {name!r} shares keys between layers, which is not supported: take another model")
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UserError(
            f"model {name!r} has layers of kind {', '.join(sorted(kinds))}, not plain attention: take another model"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model {name!r} is an encoder-decoder model: take a decoder-only one")
    if any(getattr(module, "sinks", None) is not None for module in attention_modules(model)):
        raise UserError(f"model {name!r} has learned attention sinks, which are not supported: take another model")
    if not attention_modules(model):
        raise UserError(
            f"model {name!r} has no attention layers that can be switched: take a model of the transformers library"
        )


def check_call(kwargs: dict[str, Any]) -> None:
    """Refuse what a layer asks of its attention beyond softmax(QK)V, instead of leaving it out."""
    if kwargs.get("softcap") is not None:
        raise UserError("this model soft-caps attention scores, which sparse attention here does not do: take another model")
    if kwargs.get("s_aux") is not None:
        raise UserError("this model has learned attention sinks (s_aux), which are not supported: take another model")
    if kwargs.get("position_bias") is not None or kwargs.get("indices") is not None:
        raise UserError("this model changes its attention scores in a way that is not supported: take another model")


def window_of(module: Any, kwargs: dict[str, Any]) -> int | None:
    """The sliding window of a layer's call, in keys; None without one, and where the model's positions end before it does."""
    window: int | None = kwargs.get("sliding_window")
    longest = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    return None if window is not None and longest is not None and window >= longest else window


@contextmanager
def switched(configs: list[Any], implementation: str) -> Iterator[None]:
    """All these configs use `implementation` inside; restored afterwards, whatever happens."""
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = implementation
            if config._attn_implementation != implementation:
                raise UserError(f"model type {config.model_type!r} does not let its attention be switched: take another model")
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
