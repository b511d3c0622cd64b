"""Proposals near the incumbent, ranked by a quadratic response surface of its neighbourhood (Box and Wilson 1951).

TPE finds the right region, but seldom takes the small steps that decide how close a study comes to the optimum under a budget.
Error and density are smooth in most parameters, so a polynomial fitted to the nearest trials predicts which of many candidate
steps keep the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmark.search.trial import magnitude
from benchmark.storage.records import Params
from benchmark.storage.search_records import Evaluation

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

CANDIDATES = 64
LONGEST, SHORTEST = 0.3, 0.003  # standard deviation of a step, as a share of a parameter's range
MOVED = 2  # parameters that a step changes, on average
NEIGHBOURS = 8  # the surface is fitted to this many trials, times the number of parameters plus one
RIDGE = 1e-3


class LocalSearch:
    """Receives every trial; `ask` perturbs the best one under the given objective. Seeded."""

    def __init__(self, distributions: Mapping[str, BaseDistribution], *, seed: int) -> None:
        self._distributions: Mapping[str, Any] = distributions
        self._random = np.random.RandomState(seed)
        self._points: list[list[float]] = []  # parameters of each evaluated trial, scaled to [0, 1]
        self._figures: list[Evaluation] = []
        self._known: set[str] = set()

    def tell(self, params: Mapping[str, Any], figures: Evaluation | None) -> None:
        """Add a trial; figures None: it failed."""
        self._known.add(_key(params))
        if figures is not None:
            self._points.append([_scaled(kind, params[name]) for name, kind in self._distributions.items()])
            self._figures.append(figures)

    def ask(self, value: Callable[[Evaluation], float]) -> Params | None:
        """Parameters near the best trial that were not asked for before; None if no candidate is new.

        value: the objective to minimise, of measured and of predicted figures.
        """
        if not self._figures:
            return None
        values = [value(figures) for figures in self._figures]
        best = values.index(min(values))
        candidates = self._candidates(np.array(self._points[best]))
        predicted = [value(figures) for figures in self._predict(best, candidates)]
        for index in np.argsort(predicted, kind="stable"):
            scaled = zip(self._distributions.items(), candidates[index], strict=True)
            params = {name: _value(kind, float(entry)) for (name, kind), entry in scaled}
            if (key := _key(params)) not in self._known:
                self._known.add(key)
                return params
        return None

    def _candidates(self, start: np.ndarray) -> np.ndarray:
        """Points (CANDIDATES, P) around one (P,), with a few parameters changed in each. All steps of a call have one scale."""
        shape = (CANDIDATES, len(start))
        moved = self._random.random_sample(shape) < MOVED / len(start)
        moved[np.arange(CANDIDATES), self._random.randint(len(start), size=CANDIDATES)] |= ~moved.any(-1)
        length = LONGEST * (SHORTEST / LONGEST) ** self._random.random_sample()
        steps = length * self._random.standard_normal(shape)
        for column, kind in enumerate(self._distributions.values()):
            if _is_choice(kind):  # to the choice before or after
                steps[:, column] = np.sign(steps[:, column]) / max(1, len(kind.choices) - 1)
        reached: np.ndarray = np.abs(start + moved * steps)  # reflected at both ends of a range
        clipped: np.ndarray = np.clip(1 - np.abs(1 - reached), 0.0, 1.0)
        return clipped

    def _predict(self, best: int, points: np.ndarray) -> list[Evaluation]:
        """Predicted figures at points (K, P): a quadratic polynomial through the best trial's figures, in orders of magnitude,
        fitted by least squares to the nearest trials."""
        offsets = np.array(self._points) - self._points[best]
        figures = np.array([[magnitude(entry.error), magnitude(entry.density)] for entry in self._figures])
        distance = np.linalg.norm(offsets, axis=-1)
        near = np.argsort(distance, kind="stable")[: NEIGHBOURS * (offsets.shape[1] + 1)]
        width = distance[near].max() / 1.5 + 1e-9
        weight = np.exp(-((distance[near] / width) ** 2))[:, None]
        known = _terms(offsets[near])
        # Quadratic terms get the stronger ridge penalty: few trials determine them poorly.
        ridge = RIDGE * np.where(np.arange(known.shape[1]) < offsets.shape[1], RIDGE, 1.0)
        wanted = known.T @ ((figures[near] - figures[best]) * weight)
        surface = np.linalg.solve(known.T @ (known * weight) + np.diag(ridge), wanted)
        logs = np.clip(_terms(points - self._points[best]) @ surface + figures[best], -6.0, 6.0)
        return [Evaluation(error=10**error, density=10**density, seconds=0.0) for error, density in logs.tolist()]


def _key(params: Mapping[str, Any]) -> str:
    return repr(sorted(params.items()))


def _terms(offsets: np.ndarray) -> np.ndarray:
    """Linear and quadratic terms of offsets (K, P): (K, P + P (P + 1) / 2)."""
    first, second = np.triu_indices(offsets.shape[1])
    return np.hstack([offsets, offsets[:, first] * offsets[:, second]])


def _scaled(kind: Any, value: Any) -> float:
    """A parameter's value scaled to [0, 1], linearly or logarithmically as its distribution is."""
    if kind.single():
        return 0.0
    if _is_choice(kind):
        return float(kind.to_internal_repr(value) / (len(kind.choices) - 1))
    low, high, value = (math.log(v) for v in (kind.low, kind.high, value)) if kind.log else (kind.low, kind.high, value)
    return float((value - low) / (high - low))


def _value(kind: Any, scaled: float) -> Any:
    """The inverse of `_scaled`, rounded to a value of the distribution."""
    if _is_choice(kind):
        return kind.choices[round(scaled * (len(kind.choices) - 1))]
    if kind.log:
        value = math.exp(math.log(kind.low) + scaled * (math.log(kind.high) - math.log(kind.low)))
    else:
        value = kind.low + scaled * (kind.high - kind.low)
    if kind.step is not None:
        value = kind.low + round((value - kind.low) / kind.step) * kind.step
    value = min(max(value, kind.low), kind.high)
    return type(kind.low)(value)


def _is_choice(kind: Any) -> bool:
    return hasattr(kind, "choices")
