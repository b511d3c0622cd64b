"""Values that calls share, so that each is computed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from .layout import Layout

T = TypeVar("T")


@dataclass
class CallCache:
    """Three scopes, narrowest first. Calls may share the wider ones.

    call: depends on the call's tensors. Shared by its maskers and by all configurations replayed on it.
    draws: depends on layer, seeds and layout: random numbers. Shared by calls with other tensors.
    layouts: depends on shape and attention mask. Shared by all layers of a forward pass.
    keeps_order: so many configurations read this call that sorting its scores once pays.
    makers: how to get a value of the call, by its name, at less cost than from the call's own tensors.
    """

    call: dict[Hashable, object] = field(default_factory=dict)
    draws: dict[Hashable, object] = field(default_factory=dict)
    layouts: dict[Hashable, Layout] = field(default_factory=dict)
    keeps_order: bool = False
    makers: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)


def once(scope: dict[Hashable, Any], name: Hashable, make: Callable[[], T]) -> T:
    """`make()` on the first call with this name, the same value on later ones."""
    if name not in scope:
        scope[name] = make()
    value: T = scope[name]
    return value
