"""Values that calls share, so that each is computed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from .layout import Layout

T = TypeVar("T")


@dataclass
class CallCache:
    """Three scopes, from the narrowest. A caller hands the wider ones on to other calls that they hold for.

    call: what follows from a call's tensors. All maskers of the call and all configurations that are replayed on it share it.
    draws: what follows from layer, seeds and layout: random numbers. Calls that differ in their tensors alone share it.
    layouts: what follows from shape and attention mask. All layers of a forward pass share it.

    keeps_order: whether so many configurations look at the call that sorting its scores once pays.
    """

    call: dict[Hashable, object] = field(default_factory=dict)
    draws: dict[Hashable, object] = field(default_factory=dict)
    layouts: dict[Hashable, Layout] = field(default_factory=dict)
    keeps_order: bool = False

    def layout(
        self, shape: tuple[int, int, int, int], kv_heads: int, device: torch.device, attention_mask: Tensor | None
    ) -> Layout:
        name = (shape, kv_heads, device)
        if name not in self.layouts:
            self.layouts[name] = Layout(shape, kv_heads, device, attention_mask)
        return self.layouts[name]


def once(scope: dict[Hashable, object], name: Hashable, make: Callable[[], T]) -> T:
    """`make()` the first time, its value ever after."""
    if name not in scope:
        scope[name] = make()
    return scope[name]  # type: ignore[return-value]
