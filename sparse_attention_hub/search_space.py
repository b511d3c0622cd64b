"""Domains of a search space. A config class returns {field: domain} from `get_search_space`.

The benchmark converts them to `ray.tune` domains; a config class may return those instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """One of the given values."""

    values: Sequence[Any]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("Choice needs at least one value, got none")
        object.__setattr__(self, "values", tuple(self.values))


@dataclass(frozen=True)
class _Interval:
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"{type(self).__name__} needs low <= high, got {self.low} and {self.high}")


class Uniform(_Interval):
    """A float in [low, high], uniform."""


class LogUniform(_Interval):
    """A float in [low, high], uniform in its logarithm; low > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low > 0:
            raise ValueError(f"LogUniform needs 0 < low <= high, got {self.low} and {self.high}")


@dataclass(frozen=True)
class IntUniform(_Interval):
    """An integer in [low, high], both included, uniform."""

    low: int
    high: int
