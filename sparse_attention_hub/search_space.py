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
class Uniform:
    """A float in [low, high], uniform."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"Uniform needs low < high, got {self.low} and {self.high}")


@dataclass(frozen=True)
class LogUniform:
    """A float in [low, high], uniform in its logarithm."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"LogUniform needs 0 < low < high, got {self.low} and {self.high}")


@dataclass(frozen=True)
class IntUniform:
    """An integer in [low, high], both included, uniform."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"IntUniform needs low <= high, got {self.low} and {self.high}")
