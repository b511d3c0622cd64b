"""Switching a loaded model between attention implementations, without reloading it.

At every layer of a forward pass, a model looks up its attention function by the name in its config.
Switching sets that name in each config object involved; two threads must not switch one model at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ..attention import AttentionResult
from ..errors import UserError


class SessionAttention:
    """An attention function of transformers that passes each call on to the session in use.

    A session has `attend(module, queries (B, H, Q, D), keys, values (B, Hkv, N, D), mask, scaling, kwargs)
    -> (B, Q, H, D)`. name: for transformers, where "flash", "sdpa" or "/" in a name have meanings.
    scope: where it works, for the error message. make_mask: makes the mask of a forward pass.
    """

    def __init__(self, name: str, scope: str, make_mask: Callable[..., Tensor | None]) -> None:
        self._name, self._scope = name, scope
        self._session: ContextVar[Any] = ContextVar(name, default=None)
        AttentionInterface.register(name, self._attend)
        AttentionMaskInterface.register(name, make_mask)

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        session = self._session.get()
        if session is None:
            raise RuntimeError(f"attention {self._name!r} works {self._scope}")
        return session.attend(module, query, key, value, attention_mask, kwargs.pop("scaling", None), kwargs), None

    @contextmanager
    def used_by(self, session: Any, configs: list[Any]) -> Iterator[None]:
        """Inside, the model of these configs uses this attention, and in this thread its calls go to `session`."""
        token = self._session.set(session)
        try:
            with switched(configs, self._name):
                yield
        finally:
            self._session.reset(token)


class SparseMeans:
    """Means over query rows and sparse layers; None before the first sparse row."""

    _rows = 0
    _density = 0.0
    _kv_fraction = 0.0

    def add(self, result: AttentionResult, rows: int) -> None:
        """Add the result of one layer, itself a mean over `rows` query rows."""
        self._rows += rows
        self._density += result.density * rows
        self._kv_fraction += result.kv_fraction * rows

    @property
    def density(self) -> float | None:
        return self._density / self._rows if self._rows else None

    @property
    def kv_fraction(self) -> float | None:
        return self._kv_fraction / self._rows if self._rows else None


def attention_configs(model: Any) -> list[Any]:
    """The config objects that decide the text decoder's attention and its masks; never those of a vision tower."""
    configs = [model.config, model.config.get_text_config(decoder=True), *(m.config for m in attention_modules(model))]
    return list({id(config): config for config in configs}.values())


def attention_modules(model: Any) -> list[Any]:
    """The decoder's attention layers: modules that know their layer and project queries or keys."""
    projections = ("q_proj", "k_proj", "qkv_proj", "query_key_value", "c_attn", "W_pack")
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "config")
        and any(hasattr(module, name) for name in projections)
    ]


_SOFT_CAP = "soft-caps attention scores, which sparse attention here does not do: take another model"
_SINKS = "has learned attention sinks, which are not supported: take another model"
_CHANGED = "changes its attention scores in a way that is not supported: take another model"


def check_supported(model: Any, name: str) -> None:
    """UserError for models whose attention this library would get wrong."""
    config, layers = model.config.get_text_config(decoder=True), attention_modules(model)
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    problems = {
        _SOFT_CAP: getattr(config, "attn_logit_softcapping", None),
        "shares keys between layers, which is not supported: take another model": getattr(config, "num_kv_shared_layers", 0),
        f"has layers of kind {', '.join(sorted(kinds))}, not plain attention: take another model": kinds,
        "is an encoder-decoder model: take a decoder-only one": getattr(config, "is_encoder_decoder", False),
        _SINKS: any(getattr(layer, "sinks", None) is not None for layer in layers),
        "has no attention layers that can be switched: take a model of the transformers library": not layers,
    }
    for problem, present in problems.items():
        if present:
            raise UserError(f"model {name!r} {problem}")


def checked_window(module: Any, kwargs: dict[str, Any]) -> int | None:
    """The sliding window of a layer's call, in keys. None without one, or if no position reaches beyond it.

    UserError if the layer asks its attention for more than softmax(QK)V.
    """
    refused = {"softcap": _SOFT_CAP, "s_aux": _SINKS, "position_bias": _CHANGED, "indices": _CHANGED}
    for name, problem in refused.items():
        if kwargs.get(name) is not None:
            raise UserError(f"this model {problem}")
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
