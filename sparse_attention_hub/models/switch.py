"""Switching a loaded model between attention implementations, without reloading it.

At every layer of a forward pass, a model looks up its attention function by the name in its config.
Switching sets that name in each config object involved; two threads must not switch one model at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ..attention import AttentionResult
from ..errors import UserError
from .config_checks import check_config


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
            with switched(configs, self._name), without_cudnn():
                yield
        finally:
            self._session.reset(token)


class SparseMeans:
    """Means over query rows and sparse layers; None before the first sparse row. Summed on the device, which is read at the end."""

    _rows = 0
    _selectors: float | Tensor = 0.0
    _later: list[tuple[Tensor, Tensor, int]] | None = None
    _density: float | Tensor = 0.0
    _kv_fraction: float | Tensor = 0.0

    def add(self, result: AttentionResult, rows: int) -> None:
        """Add the result of one layer, itself a mean over `rows` query rows."""
        self._rows += rows
        self._density = plus(self._density, result.density_share, rows)
        self._kv_fraction = plus(self._kv_fraction, result.kv_share, rows)

    def add_later(self, densities: Tensor, kv_fractions: Tensor, place: int, layers: int, selectors: float | Tensor) -> None:
        """Add one query row's sums over layers, at a place of tensors that several answers share. selectors: summed, and not in the
        fractions."""
        self._later = self._later or []
        self._later.append((densities, kv_fractions, place))
        self._rows += layers
        self._selectors = plus(self._selectors, selectors, 1)

    def _collect(self) -> None:
        """Sum what `add_later` was given."""
        if self._later:
            densities, kv_fractions, places = zip(*self._later, strict=True)
            for name, shares in (("_density", densities), ("_kv_fraction", kv_fractions)):
                each = [share[place].to(shares[0].device) for share, place in zip(shares, places, strict=True)]
                setattr(self, name, plus(getattr(self, name), torch.stack(each).sum(), 1))
            self._later = None

    @property
    def density(self) -> float | None:
        self._collect()
        return float(self._density) / self._rows if self._rows else None

    @property
    def kv_fraction(self) -> float | None:
        self._collect()
        return (float(self._kv_fraction) + float(self._selectors)) / self._rows if self._rows else None


def plus(total: float | Tensor, share: float | Tensor, rows: int) -> float | Tensor:
    """The sum, on the device of the total: layers may be on several."""
    if isinstance(total, Tensor) and isinstance(share, Tensor):
        return torch.add(total, share.to(total.device), alpha=rows)
    return total + share * rows


def attention_configs(model: Any) -> list[Any]:
    """The config objects that decide the text decoder's attention and its masks; never those of a vision tower."""
    configs = [model.config, model.config.get_text_config(decoder=True), *(m.config for m in attention_modules(model))]
    return list({id(config): config for config in configs}.values())


def attention_modules(model: Any) -> list[Any]:
    """The decoder's attention layers: modules that know their layer and project queries or keys."""
    projections = ("q_proj", "k_proj", "qkv_proj", "query_key_value", "c_attn", "W_pack", "kv_b_proj")
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "config")
        and any(hasattr(module, name) for name in projections)
    ]


def check_supported(model: Any, name: str) -> None:
    """UserError for models whose attention cannot be switched, or would be computed wrongly."""
    config = model.config.get_text_config(decoder=True)
    check_config(config, name)
    if not attention_modules(model) or not type(model)._can_set_attn_implementation():
        raise UserError(
            f"model {name!r} ({config.model_type}) computes attention in its own code, not through transformers' attention "
            "interface, so it cannot be made sparse: take another model"
        )


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Inside, torch's fused attention is flash attention or its memory-efficient form. cuDNN's, the default on an H100, builds a
    graph for every new number of keys, so at every decode step: tens to hundreds of milliseconds, and the graphs are kept."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


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
